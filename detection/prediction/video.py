"""Videos read and written frame by frame with PyAV, which is an optional dependency."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from PIL import Image

from ...base.errors import NatsError, one_line
from ...base.files import atomic_file

DEFAULT_RATE = Fraction(25)  # frames per second, where a file does not say
ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the best that PyAV was built with
QUALITY = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qscale": "3"}}


class Frame(NamedTuple):
    """One picture of a video.

    Attributes:
        number: from 0, of all frames of the video.
        time: seconds since the first frame.
        image: RGB, upright.
    """

    number: int
    time: float
    image: Image.Image


class VideoInfo(NamedTuple):
    """What a video is like.

    Attributes:
        width, height: pixels, upright.
        rate: frames per second, on average.
        frames: how many the file says it has; 0 if it does not.
        ticks: unit of its time stamps, seconds.
    """

    width: int
    height: int
    rate: Fraction
    frames: int
    ticks: Fraction


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Decode a video's first frame, so as to know what it is like.

    Raises:
        NatsError: PyAV is missing, or the file holds no video that it reads.
    """
    with _open(path) as (stream, frames):
        first = next(frames, None)
        if first is None:
            raise NatsError(f"{path}: no frame in this video")
        size = (first.width, first.height) if _quarter_turns(first) % 2 == 0 else (first.height, first.width)
        return VideoInfo(*size, stream.average_rate or DEFAULT_RATE, stream.frames, stream.time_base)


def read_frames(path: str | os.PathLike, every: int = 1) -> Iterator[Frame]:
    """Every n-th frame of a video, from the first on.

    Raises:
        NatsError: as `probe_video`; or a frame that can not be decoded, or is of another size than the first.
    """
    with _open(path) as (stream, frames):
        rate, begin, size = stream.average_rate or DEFAULT_RATE, None, None
        for number, frame in enumerate(frames):
            time = float(number / rate) if frame.time is None else frame.time
            begin = time if begin is None else begin
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                found = f"frame {number} has {frame.width}x{frame.height}"
                raise NatsError(f"{path}: expected frames of one size, {size[0]}x{size[1]}, {found}")
            if number % every == 0:
                yield Frame(number, time - begin, _upright(frame))


@contextmanager
def write_video(path: str | os.PathLike, info: VideoInfo, rate: Fraction) -> Iterator[Callable[[Frame], None]]:
    """Write an MP4 of frames at their times; it takes its name when the block ends well, else it vanishes.

    Args:
        path: the MP4 file.
        info: of the video that the frames have their size and times from.
        rate: frames per second, as the file will say.

    Yields:
        What writes one frame.
    """
    av = import_av(path)
    with atomic_file(path) as scratch, av.open(str(scratch), "w", format="mp4") as container:
        stream = _add_stream(av, container, info, rate)
        last = -1

        def write(frame: Frame) -> None:
            nonlocal last
            picture = av.VideoFrame.from_image(frame.image)
            last = max(last + 1, round(frame.time / info.ticks))  # encoders take increasing times only
            picture.pts, picture.time_base = last, info.ticks
            container.mux(stream.encode(picture))

        yield write
        container.mux(stream.encode())


def import_av(path: str | os.PathLike) -> Any:
    """The module `av`; NatsError says how to install it for the sake of this file."""
    try:
        import av
    except ImportError as error:
        raise NatsError(f"{path}: videos take PyAV: pip install 'nats-zoo[video]', or pip install av") from error
    # Older torchvisions have FFmpeg's threads log into Python; one that does while Python waits for its end, waits for
    # Python, for ever.
    av.logging.set_level(None)
    return av


@contextmanager
def _open(path: str | os.PathLike) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The first video stream of a file, and its decoded frames."""
    av = import_av(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise NatsError(f"{path}: no video in this file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream, container.decode(stream)
    except av.error.FFmpegError as error:
        raise NatsError(f"{path}: can not be decoded as a video: {one_line(error)}") from error


def _add_stream(av: Any, container: Any, info: VideoInfo, rate: Fraction) -> Any:
    encoder = next(name for name in ENCODERS if name in av.codecs_available)
    stream = container.add_stream(encoder, rate=rate, options=QUALITY.get(encoder, {}))
    stream.width, stream.height = info.width, info.height
    # Colour at half the size, which all players read, goes with even sides only
    is_odd = info.width % 2 or info.height % 2
    stream.pix_fmt = "yuv444p" if is_odd and encoder == "libx264" else "yuv420p"
    stream.codec_context.time_base = info.ticks
    return stream


def _quarter_turns(frame: Any) -> int:
    """Anticlockwise, to be shown upright: phones store frames as the sensor lies."""
    return round(frame.rotation / 90) % 4


def _upright(frame: Any) -> Image.Image:
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[_quarter_turns(frame)]
    return frame.to_image() if turn is None else frame.to_image().transpose(turn)
