"""Predicting on images, folders and videos.

    from nats_zoo.detection import from_pretrained
    from nats_zoo.detection.prediction import detect, draw_found, open_image, predict_images

    detector = from_pretrained("runs/nats/model")
    detector([image])  # torchvision's own interface: (3, H, W) tensors in 0..1, dicts of tensors
    found = detect(detector, open_image("photo.jpg"), threshold=0.5)  # the same as plain data
    draw_found(open_image("photo.jpg"), found, detector.config.classes).save("drawn.png")
    for line in predict_images(detector, ["photos/*.jpg"], "drawn", batch_size=8, precision="bf16"):
        print(line)  # all of `nats predict`

Imports `runs`, `models`, `data` and `pictures`.
"""

from ..data.images import open_image
from .predict import detect, draw_found, predict_images

__all__ = ["detect", "draw_found", "open_image", "predict_images"]
