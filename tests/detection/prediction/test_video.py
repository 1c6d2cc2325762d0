"""Videos through `nats predict`: as many frames of the same size at the same times, and what was found on each."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from nats_zoo import NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection import create_detector, save_detector
from nats_zoo.detection.prediction.predict import detect, predict_images
from nats_zoo.detection.prediction.video import Frame, VideoInfo, probe_video, read_frames, write_video

av = pytest.importorskip("av")

RATE = Fraction(30000, 1001)  # what cameras call 29.97


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    options = {"fpn_channels": 8, "head_size": 16, "mask_channels": 8, "min_size": 64, "max_size": 96, "detections": 4}
    detector = create_detector("maskrcnn", "resnet18", 3, weights=None, classes=("cat", "dog"), **options)
    return save_detector(detector, tmp_path_factory.mktemp("video") / "model")


def picture(number, size=(96, 64)):
    """A frame that tells its number: a bright block moves to the right."""
    pixels = np.full((size[1], size[0], 3), 40, dtype=np.uint8)
    pixels[8:24, 6 * number : 6 * number + 12] = (230, 180, 60)
    return Image.fromarray(pixels)


def film(path, frames=10, size=(96, 64), times=None, turn=0, codec="libx264"):
    """A video of `picture`s, at a steady rate or at these times in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(number, size))
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def look(path):
    """(frames as arrays, their times in seconds, the average rate) of a video."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(stream)]
        return [pixels for pixels, _ in frames], [when for _, when in frames], stream.average_rate


def read(path):
    return json.loads(path.read_text())


def predict(model, *arguments):
    return cli.main(["predict", str(model), *map(str, arguments), "--threshold", "0"])


def test_decoders_do_not_log_into_python_which_waits_for_their_end(tmp_path):
    av.logging.set_level(av.logging.ERROR)  # as a torchvision with video readers does
    probe_video(film(tmp_path / "cats.mp4"))
    assert av.logging.get_level() is None


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_frame_is_drawn_at_its_size_and_time(model, tmp_path, batch_size, capsys):
    source = film(tmp_path / "cats.mp4")
    assert predict(model, source, "--output", tmp_path / "out", "--batch_size", batch_size) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cats.mp4", "cats.json"}
    before, after = look(source), look(tmp_path / "out" / "cats.mp4")
    assert [frame.shape for frame in after[0]] == [(64, 96, 3)] * 10
    assert after[1] == pytest.approx(before[1], abs=1e-4)
    assert after[2] == before[2] == RATE
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{source}: 40 boxes on 10 frames, drawn in {tmp_path / 'out' / 'cats.mp4'}"
    assert said[1].startswith("10 frames, ")


def test_the_json_holds_what_the_detector_finds_on_each_frame(model, tmp_path):
    from nats_zoo.detection import from_pretrained

    source = film(tmp_path / "cats.mp4", frames=4)
    assert predict(model, source, "--output", tmp_path, "--draw", "false", "--batch_size", 3) == 2  # cats.json fits not
    assert predict(model, source, "--output", tmp_path / "out", "--draw", "false", "--batch_size", 3) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cats.json"]
    content = read(tmp_path / "out" / "cats.json")
    frames = content.pop("frames")
    assert content == {"video": str(source), "width": 96, "height": 64, "frame_rate": pytest.approx(float(RATE))}
    detector = from_pretrained(model)
    for number, (frame, pixels) in enumerate(zip(frames, look(source)[0], strict=True)):
        assert (frame["frame"], frame["time"]) == (number, pytest.approx(number / RATE, abs=1e-4))
        expected = detect(detector, Image.fromarray(pixels), 0.0)
        assert [row["label"] for row in frame["found"]] == [row["label"] for row in expected]
        assert np.allclose([row["box"] for row in frame["found"]], [row["box"] for row in expected], atol=1e-2)
        assert all(row["mask"]["size"] == [64, 96] for row in frame["found"])


def test_only_every_third_frame_on_request(model, tmp_path):
    source = film(tmp_path / "cats.mp4")
    assert predict(model, source, "--output", tmp_path / "out", "--every", 3) == 0
    assert [frame["frame"] for frame in read(tmp_path / "out" / "cats.json")["frames"]] == [0, 3, 6, 9]
    frames, times, _ = look(tmp_path / "out" / "cats.mp4")
    assert len(frames) == 4
    assert times == pytest.approx([number / RATE for number in (0, 3, 6, 9)], abs=1e-4)


def copy_video(source, target, **changes):
    """Read and write without drawing."""
    info = probe_video(source)
    with write_video(target, info._replace(**changes), info.rate) as write:
        for frame in read_frames(source):
            write(frame)
    return look(target)


@pytest.mark.parametrize("size", [(96, 64), (97, 65)])
def test_frames_come_back_nearly_as_they_were(tmp_path, size):
    source = film(tmp_path / "in.mp4", size=size)
    frames, _, _ = copy_video(source, tmp_path / "out.mp4")
    originals = [np.asarray(picture(number, size)).astype(int) for number in range(10)]
    assert len(frames) == 10
    for number, frame in enumerate(frames):
        errors = [np.abs(frame - original).mean() for original in originals]
        assert np.argmin(errors) == number
        assert errors[number] < 4 < np.median(errors)


def test_uneven_times_are_kept(tmp_path):
    times = [0, 40, 50, 200, 210, 1000]
    source = film(tmp_path / "in.mkv", frames=6, times=times)
    assert copy_video(source, tmp_path / "out.mp4")[1] == pytest.approx([when / 1000 for when in times], abs=2e-3)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV writes none yet")
@pytest.mark.parametrize("turn", [90, 180, -90, 0])
def test_turned_videos_are_shown_upright(tmp_path, turn):
    """As phones write them: what is stored is to be shown `turn` degrees further, anticlockwise."""
    source = film(tmp_path / "in.mp4", frames=1, turn=turn)
    (frame,) = read_frames(source)
    expected = np.rot90(np.asarray(picture(0)), turn // 90)
    assert np.abs(np.asarray(frame.image).astype(int) - expected).mean() < 4
    info = probe_video(source)
    assert (info.width, info.height) == frame.image.size == expected.shape[1::-1]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def damaged(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    content = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return {"text.mp4": "can not be decoded", "cut.mp4": "can not be decoded", "sound.mp4": "no video in this file"}


def test_files_that_are_no_videos_are_named_before_anything_is_written(model, tmp_path, capsys):
    for name, expected in damaged(tmp_path).items():
        assert predict(model, tmp_path / "whole.mp4", tmp_path / name, "--output", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path / name}: {expected}" in line
        assert not (tmp_path / "out").exists()


def test_a_video_does_not_replace_itself(model, tmp_path):
    source = film(tmp_path / "cats.mp4", frames=2)
    content = source.read_bytes()
    with pytest.raises(NatsError, match=r"cats\.mp4: is one of the images and would be replaced"):
        list(predict_images(str(model), [str(source)], str(tmp_path)))
    assert source.read_bytes() == content


def test_an_error_in_the_middle_leaves_no_video(tmp_path):
    source = film(tmp_path / "in.mp4")
    info = probe_video(source)

    def fail():
        with write_video(tmp_path / "out.mp4", info, info.rate) as write:
            for frame in read_frames(source):
                write(frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


# In a shell's background interrupts are ignored, and would be by the child too.
HEED_INTERRUPTS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from nats_zoo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_leaves_nothing_half_written(model, tmp_path):
    size = (320, 240)
    info = VideoInfo(*size, Fraction(25), 400, Fraction(1, 25))
    with write_video(tmp_path / "long.mp4", info, info.rate) as write:
        for number in range(400):
            write(Frame(number, number / 25, picture(number % 50, size)))
    command = [sys.executable, "-c", HEED_INTERRUPTS, "predict", str(model), "long.mp4", "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out"
    deadline = time.monotonic() + 120
    while not (out.is_dir() and any(path.stat().st_size for path in out.iterdir())):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "nats: interrupted" in errors
    assert "Traceback" not in errors
    assert not any(out.iterdir())


def test_without_pyav_one_line_says_how_to_install_it(model, tmp_path):
    """In a process that can not import av; images go on working there."""
    film(tmp_path / "cats.mp4", frames=1)
    picture(0).save(tmp_path / "cat.png")
    code = "import sys; sys.modules['av'] = None; from nats_zoo.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(name):
        command = [sys.executable, "-c", code, "predict", str(model), name, "--output", f"out_{name}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    refused = run("cats.mp4")
    assert refused.returncode == 2
    assert refused.stderr == "nats: cats.mp4: videos take PyAV: pip install 'nats-zoo[video]', or pip install av\n"
    assert run("cat.png").returncode == 0
