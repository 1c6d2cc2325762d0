"""Average precision as COCO has it, as plain data with a table."""

import dataclasses

from ..base.text import text_table


@dataclasses.dataclass(frozen=True)
class Metrics:
    """COCO's metrics in percent, of boxes unless said otherwise. None: there is no such object to be found.

    Attributes:
        ap: average precision, mean over IoU thresholds 0.50, 0.55, ..., 0.95 and over classes; of each class the 100
            best boxes per image.
        ap50: at IoU 0.50.
        ap75: at IoU 0.75.
        ap_small: of objects below 32 x 32 pixels.
        ap_medium: of objects between 32 x 32 and 96 x 96 pixels.
        ap_large: of objects above 96 x 96 pixels.
        ar_1: average recall with at most one box per image.
        ar_10: with at most 10.
        ar_100: with at most 100.
        ar_small: of small objects, at most 100.
        ar_medium: of medium objects.
        ar_large: of large objects.
        per_class: `{"ap": ..., "ap50": ...}` by class name, in order of category id.
        mask: the same of masks; None: there are no masks to be compared.

    Example:
        >>> metrics = Metrics.from_dict(json.loads(Path("runs/nats/metrics.json").read_text()))
        >>> print(metrics.table())
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar_1: float | None
    ar_10: float | None
    ar_100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, dict[str, float | None]]
    mask: "Metrics | None" = None

    def to_dict(self) -> dict:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "Metrics":
        """What `to_dict` was called on; data written before there were masks has no `mask`."""
        mask = data.get("mask")
        return cls(**{**data, "mask": None if mask is None else cls.from_dict(mask)})

    def table(self) -> str:
        """A text table: all objects and objects by size, recall, and a line per class; boxes, then masks."""
        if self.mask is None:
            return self._table()
        return f"boxes\n{self._table()}\n\nmasks\n{self.mask._table()}"

    def _table(self) -> str:
        headings = {
            **{"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl"},
            **{"ar_1": "AR1", "ar_10": "AR10", "ar_100": "AR100"},
        }
        overall = [[*headings.values()], [in_percent(getattr(self, name)) for name in headings]]
        rows = [[name, in_percent(row["ap"]), in_percent(row["ap50"])] for name, row in self.per_class.items()]
        classes = text_table([["class", "AP", "AP50"], *rows], "<", ">6", gap=" ")
        return "\n".join([*text_table(overall, ">6", gap=" "), "", *classes])


def in_percent(value: float | None) -> str:
    """Write a metric as tables have it: one digit behind the point, "-" for None.

    >>> in_percent(42.25), in_percent(None)
    ('42.2', '-')
    """
    return "-" if value is None else f"{value:.1f}"
