"""The form of a checkpoint's metadata (`facts`) and of the parts of its config that are read without building anything.

Further keys are accepted: other versions write them, and nothing here uses them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from segdeconv.system.plain_data import PlainDataError

Byte = Annotated[int, Field(ge=0, le=255)]
Label = Annotated[int, Field(ge=0, le=65535)]
Colour = Annotated[Sequence[Byte], Field(min_length=3, max_length=3)]
Name = Annotated[str, Field(max_length=1000)]
Side = Annotated[int, Field(ge=1, le=65535)]
Size = Annotated[Sequence[Side], Field(min_length=2, max_length=2)]
Statistic = Annotated[float, Field(ge=-1e9, le=1e9)]
Deviation = Annotated[float, Field(ge=1e-9, le=1e9)]
MAX_CHANNELS = 1024


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class _Classes(_Form):
    """See `Classes.to_dict`; entries with a default are absent in files of older versions."""

    names: Annotated[Sequence[Name], Field(min_length=2, max_length=256)]
    colours: Annotated[Sequence[Colour], Field(max_length=256)]
    ignore_index: Byte
    labels: Annotated[Sequence[Label], Field(max_length=256)]
    ignore_colour: Colour | None
    ignored_labels: Annotated[Sequence[int], Field(max_length=65536)] = ()
    by_colour: bool | None = None


class _Preprocessing(_Form):
    """See `Preprocessing.to_dict`; entries with a default are absent in files of older versions."""

    size: Size | None = None
    mean: Annotated[Sequence[Statistic], Field(min_length=1, max_length=MAX_CHANNELS)]
    std: Annotated[Sequence[Deviation], Field(min_length=1, max_length=MAX_CHANNELS)]
    bits: Annotated[int, Field(ge=8, le=16, multiple_of=8)] = 8
    as_stored: bool = False
    order: Literal["rgb", "bgr"] = "rgb"

    @model_validator(mode="after")
    def _require_equal_lengths(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}")
        return self


class _Extremes(_Form):
    input: Annotated[Sequence[Statistic], Field(min_length=2, max_length=2)]
    output: Annotated[Sequence[Statistic], Field(min_length=2, max_length=2)]


class _Int8(_Form):
    """See `evaluation.quantization.calibrate`."""

    ranges: Annotated[Mapping[Name, _Extremes], Field(max_length=10_000)]
    split: Name
    images: int
    float32: float
    int8: float


class _Probabilities(_Form):
    nll: Annotated[float, Field(ge=0)]
    expected_calibration_error: Annotated[float, Field(ge=0, le=1)]


class _Temperature(_Form):
    """See `evaluation.temperature.Temperature`."""

    value: Annotated[float, Field(ge=1e-9, le=1e9)]
    standard_error: Annotated[float, Field(ge=0)] | None
    split: Name
    images: int
    pixels: int
    before: _Probabilities
    after: _Probabilities


class _ClassOffsets(_Form):
    """See `evaluation.class_offsets.ClassOffsets`."""

    values: Mapping[str, Annotated[float, Field(ge=-1e3, le=1e3)]]
    split: Name
    images: int
    checked_on: Name
    before: Mapping[str, Annotated[float, Field(ge=0, le=1)]]
    after: Mapping[str, Annotated[float, Field(ge=0, le=1)]]


class _InstanceStatistics(_Form):
    """See `evaluation.instance_statistics.InstanceStatistics`."""

    weights: Annotated[Mapping[str, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=10_000)]
    checked_on: Name
    before: Annotated[float, Field(ge=0, le=1)]
    after: Annotated[float, Field(ge=0, le=1)]


class _Metadata(_Form):
    classes: _Classes
    preprocessing: _Preprocessing
    class_weights: Sequence[Annotated[float, Field(ge=0, le=1e9)]] | None = None
    fingerprints: Mapping[str, str] = {}
    precision: str
    int8: _Int8 | None = None
    temperature: _Temperature | None = None
    class_offsets: _ClassOffsets | None = None
    instance_statistics: _InstanceStatistics | None = None

    @model_validator(mode="after")
    def _require_a_weight_for_each_class(self) -> Self:
        if self.class_weights is not None and len(self.class_weights) != len(self.classes.names):
            raise ValueError(f"{len(self.classes.names)} classes have {len(self.class_weights)} class_weights")
        return self


class _Model(_Form):
    target: str = Field(alias="_target_")


class _Dataset(_Form):
    size: Size | None = None
    classes: Any = None


class _Config(_Form):
    model: _Model
    dataset: _Dataset | None = None


@functools.cache
def _adapter(form: type[_Form]) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def check_metadata(facts: Any) -> None:
    """Check the metadata of a checkpoint.

    Raises:
        PlainDataError: It has another form; the message is a phrase with the key, such as `facts.classes.names`.
    """
    _check(_Metadata, facts, "facts")


def check_config(config: Any) -> None:
    """Check the parts of a config that are read before anything is built from it.

    Raises:
        PlainDataError: They have another form; the message is a phrase with the key, such as `config.dataset.size`.
    """
    _check(_Config, config, "config")


def _check(form: type[_Form], data: Any, name: str) -> None:
    try:
        _adapter(form).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, (name, *first["loc"])))
        message = first["msg"].removeprefix("Value error, ").partition(" or instance of ")[0]
        raise PlainDataError(f"{key}: {message[:1].lower()}{message[1:]}") from error
