"""A detector's predictions on a data set, as COCO's results list them."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...networks.batch_norm import evaluation_mode
from ..data.dataset import CocoDataset, collate
from ..data.defects import DataError


def predict(
    detector: nn.Module,
    dataset: CocoDataset,
    accelerator: Accelerator,
    batch_size: int = 1,
    num_workers: int = 0,
    progress: bool = True,
    category_ids: Sequence[int | None] | None = None,
) -> list[dict]:
    """Run a detector over a data set, which the processes share among them.

    Args:
        detector: a torchvision detector, on the accelerator's device: takes a list of images, returns a list of dicts
            of boxes, labels, scores and perhaps masks. It is left in the mode, training or not, in which it came.
        dataset: its transforms must not be random.
        accelerator: knows the processes.
        batch_size: images per process. A batch is padded to its largest image, which moves AP a little: keep to one.
        num_workers: of the DataLoader.
        progress: show a bar, on the main process only.
        category_ids: the categories of the detector's labels 1, 2, ...; what it finds of a None is dropped. Default:
            the data set's, in their order.

    Returns:
        On every process the detections of all images, in the data set's order: dicts of image_id, category_id,
        bbox (x, y, width, height in pixels) and score; and, of a detector with masks, segmentation: where the mask
        exceeds 0.5, as COCO's compressed run lengths that JSON can hold.

    Raises:
        DataError: if an image can not be loaded, or the detector has more classes than there are categories.

    Example:
        >>> detector, dataset = from_pretrained("runs/nats/model"), CocoDataset("instances_val.json")
        >>> results = predict(detector, dataset, Accelerator())
        >>> save_results(results, "results.json")
    """
    category_ids = dataset.category_ids if category_ids is None else category_ids
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator())
    found: dict[int, list[dict]] = {}
    # no_grad, as what a detector caches in inference mode (anchors) could not take part in training afterwards
    with evaluation_mode(detector), torch.no_grad():
        bar = not (progress and accelerator.is_main_process)
        for images, targets in tqdm(accelerator.prepare(loader), desc="predict", disable=bar, leave=False):
            batch = [
                (target["image_id"], _results(output, target["image_id"], category_ids))
                for output, target in zip(detector(images), targets, strict=True)
            ]
            # By image id, because the last batches are filled up with images of the first
            found.update(accelerator.gather_for_metrics(batch, use_gather_object=True))
    return [result for image_id in dataset.image_ids for result in found[image_id]]


def _results(output: dict, image_id: int, category_ids: Sequence[int | None]) -> list[dict]:
    labels = output["labels"].tolist()
    if (most := max(labels, default=0)) > len(category_ids):
        raise DataError(f"the detector finds class {most}, the data set has {len(category_ids)} classes")
    # RetinaNet and FCOS score the background as a class like any other
    categories = [category_ids[label - 1] if label > 0 else None for label in labels]
    kept = [index for index, category in enumerate(categories) if category is not None]
    corners = output["boxes"][kept].float()
    boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1).tolist()
    scores = output["scores"].tolist()
    results = [
        {"image_id": image_id, "category_id": categories[index], "bbox": box, "score": scores[index]}
        for index, box in zip(kept, boxes, strict=True)
    ]
    if "masks" in output:
        for result, segmentation in zip(results, _encode_masks(output["masks"][kept]), strict=True):
            result["segmentation"] = segmentation
    return results


def _encode_masks(masks: Tensor) -> list[dict]:
    """COCO's `segmentation` of masks (N, 1, H, W) in 0..1, all of an image at once."""
    if not len(masks):
        return []
    # (H, W, N) with the rows of a mask beside each other in memory, which is what pycocotools takes without a copy
    columns = (masks[:, 0] > 0.5).mT.contiguous().byte().cpu().numpy().transpose(2, 1, 0)
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in coco_mask.encode(columns)]
