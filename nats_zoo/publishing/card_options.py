"""What only the publisher knows of a model, put into its card: licences, the data set's and the base model's names."""

import re
from dataclasses import dataclass, fields
from typing import cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..base.errors import NatsError, one_line
from ..base.text import table_row
from .card import OF_DATA, OF_MODEL, OF_WEIGHTS

OTHER = "other"
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the Hub's names of licences, and what it allows for others'


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What `publish` is told for the card; None leaves what the card says.

    Attributes:
        license: of the model, as the Hub names it (apache-2.0, cc-by-4.0), or "other".
        license_name: of another licence.
        license_link: its text, an address.
        data_license: of the training data, in any words.
        weights_license: of the base weights, as the Hub names it.
        dataset: the training data's id on the Hub.
        base_model: the base weights' id on the Hub.

    Raises:
        NatsError: naming the option and what was expected.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    data_license: str | None = None
    weights_license: str | None = None
    dataset: str | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        for option in ("license", "license_name", "weights_license"):
            _check_identifier(option, getattr(self, option))
        is_other = self.license == OTHER
        for option in ("license_name", "license_link"):
            if is_other != (getattr(self, option) is not None):
                raise NatsError(f"{option}: goes with the license 'other', which needs a license_name and license_link")
        if is_other and not re.fullmatch(r"https?://\S+", self.license_link or ""):
            raise NatsError(f"license_link: expected the address of its text, https://..., found {self.license_link!r}")
        if self.data_license is not None and not self.data_license.strip():
            raise NatsError("data_license: expected the licence's name, found an empty text")
        for option in ("dataset", "base_model"):
            _check_hub_id(option, getattr(self, option))

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) is not None for field in fields(self))

    def fill(self, card: str, source: str) -> str:
        """A card with these statements, in its metadata and in its table of licences.

        Args:
            card: the text of one that nats-zoo wrote.
            source: what error messages call it.

        Raises:
            NatsError: metadata that can not be read, or no such table.
        """
        if not self:
            return card
        try:
            parsed = ModelCard(card)
        except (ValueError, TypeError, YAMLError) as error:
            raise NatsError(f"{source}: the metadata at its head can not be read: {one_line(error)}") from error
        self._fill_metadata(parsed)
        parsed.text = self._fill_table(parsed.text, source)
        return str(parsed)

    def _fill_metadata(self, card: ModelCard) -> None:
        data = cast(ModelCardData, card.data)  # the class of any ModelCard's
        if self.license is not None:
            data.license, data.license_name, data.license_link = self.license, self.license_name, self.license_link
        if self.base_model is not None:
            data.base_model = self.base_model
        if self.dataset is not None:
            data.datasets = [self.dataset]
            for result in data.eval_results or ():
                result.dataset_type = self.dataset

    def _fill_table(self, text: str, source: str) -> str:
        if self.license is not None:
            stated = f"[{self.license_name}]({self.license_link})" if self.license_name else self.license
            text = _with_row(text, OF_MODEL, stated, source)
        if self.data_license is not None or self.dataset is not None:
            found = _row(text, OF_DATA, source)
            name = f" ({self.dataset})" if self.dataset else _in_brackets(found)
            text = _with_row(text, OF_DATA, f"{self.data_license or _before_brackets(found)}{name}", source)
        if self.weights_license is not None or self.base_model is not None:
            found = _row(text, OF_WEIGHTS, source)
            name = f" ({self.base_model})" if self.base_model else _in_brackets(found)
            text = _with_row(text, OF_WEIGHTS, f"{self.weights_license or _before_brackets(found)}{name}", source)
        return text


def _row(text: str, label: str, source: str) -> str:
    """What the table of licences says of something."""
    found = re.search(rf"^\| {label} \| (.*) \|$", text, re.MULTILINE)
    if found is None:
        raise NatsError(f"{source}: has no line '| {label} | ... |' to fill in, expected the card that nats-zoo wrote")
    return found[1]


def _with_row(text: str, label: str, value: str, source: str) -> str:
    before = f"| {label} | {_row(text, label, source)} |"
    return text.replace(before, table_row(label, value), 1)


def _in_brackets(cell: str) -> str:
    return cell[cell.index(" (") :] if " (" in cell else ""


def _before_brackets(cell: str) -> str:
    return cell.partition(" (")[0]


def _check_identifier(option: str, value: str | None) -> None:
    if value is not None and not _IDENTIFIER.fullmatch(value):
        raise NatsError(
            f"{option}: expected a name as the Hub writes it, small letters, digits, '-' and '.' such as apache-2.0,"
            f" found {value!r}"
        )


def _check_hub_id(option: str, value: str | None) -> None:
    if value is None:
        return
    try:
        validate_repo_id(value)
    except HFValidationError:
        raise NatsError(f"{option}: expected an id on the Hub, such as org/name, found {value!r}") from None
