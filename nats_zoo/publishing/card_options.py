"""What only the publisher knows of a model, put into its card: licences, the data set's and the base model's names."""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..base.errors import NatsError, one_line
from .card import LICENCES, Licences

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

    Example:
        >>> options = CardOptions(license="mit", dataset="org/pets")
        >>> text = options.fill(Path("runs/nats/best/README.md").read_text(), "README.md")
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
        """Put these statements into a card: into its metadata, and into its section on licences, which is made anew.

        Args:
            card: the text of one that nats-zoo wrote; what else was written into it by hand stays.
            source: what error messages call it.

        Raises:
            NatsError: metadata that can not be read, or no such section.
        """
        if not self:
            return card
        try:
            parsed = ModelCard(card)
        except (ValueError, TypeError, YAMLError) as error:
            raise NatsError(f"{source}: the metadata at its head can not be read: {one_line(error)}") from error
        data = cast(ModelCardData, parsed.data)  # the class of any ModelCard's
        before, heading, rest = parsed.text.partition(Licences.HEADING)
        section, end, behind = rest.partition("\n## ")
        licences = Licences.of_card(data, section) if heading else None
        if licences is None:
            expected = "expected the card that nats-zoo wrote"
            raise NatsError(f"{source}: has no line '| {Licences.ROWS[0]} | ... |' to fill in, {expected}")
        licences = self._filled(licences)
        self._fill_metadata(data, licences)
        parsed.text = f"{before}{licences.section()}\n{end}{behind}"
        return str(parsed)

    def _filled(self, licences: Licences) -> Licences:
        model = f"[{self.license_name}]({self.license_link})" if self.license_name else self.license
        stated = {
            "model": model,
            "data": self.data_license,
            "dataset": self.dataset,
            "weights": self.weights_license,
            "base": self.base_model,
        }
        return replace(licences, **{name: text for name, text in stated.items() if text is not None})

    def _fill_metadata(self, data: ModelCardData, licences: Licences) -> None:
        if self.license is not None:
            data.license, data.license_name, data.license_link = self.license, self.license_name, self.license_link
        if self.base_model is not None:
            data.base_model = self.base_model
        if self.dataset is not None:
            data.datasets = [self.dataset]
            for result in data.eval_results or ():
                result.dataset_type = self.dataset
        kept = data.get("nats_zoo")
        data["nats_zoo"] = {**(kept if isinstance(kept, dict) else {}), LICENCES: asdict(licences)}


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
