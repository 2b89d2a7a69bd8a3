"""Conversion of a picture to a network's input: the transforms of torchvision and timm as a serialisable record."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dsconv.errors import ConfigError, DataError, import_extra

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

Pixels = Annotated[int, Field(ge=1, le=65536)]
PerChannel = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Transpositions that undo each orientation except the first, which is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112
PHOTOGRAPH_MEAN, PHOTOGRAPH_DEVIATION = 0.45, 0.25
"""Mean and standard deviation of a photograph's pixels, with white equal to 1."""


class Preprocess(BaseModel):
    """Preprocessing of a picture for a network: convert, resize, crop the centre, scale, normalise.

    The steps and their rounding are those of torchvision's ``ImageClassification`` preset on PIL images, so a crop
    larger than the picture pads it with black. Before them, the picture is rotated according to its EXIF orientation,
    which torchvision does not do. The first frame of an animation is used, and transparency is dropped: the colours
    beneath it are used. The record is immutable and survives ``model_dump_json``.

    Args:
        resize: length of the shorter side in pixels, with the aspect ratio kept; a pair ``(height, width)`` ignores the
            aspect ratio; None keeps the size.
        crop: ``(height, width)`` in pixels of the centre crop, an int for a square, None for no crop.
        mean, std: subtracted, then divided by, in the units of ``scale`` and the order of ``channels``: one number for
            all channels or one per channel.
        interpolation: Pillow's filter for ``resize``.
        scale: value of white before mean and std: 1.0, or 255.0 for networks in the style of Caffe.
        channels: ``"rgb"``, ``"bgr"`` or ``"gray"`` (one channel).

    Raises:
        ConfigError: a setting is unknown, or a value is out of range (from ``model_validate``: pydantic's
            ValidationError).

    >>> from PIL import Image
    >>> preprocess = Preprocess.imagenet(size=224)
    >>> preprocess(Image.new("RGB", (640, 480))).shape
    torch.Size([3, 224, 224])
    >>> Preprocess.model_validate_json(preprocess.model_dump_json()) == preprocess
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resize: Pixels | tuple[Pixels, Pixels] | None = None
    crop: tuple[Pixels, Pixels] | None = None
    mean: PerChannel = (0.0,)
    std: PerChannel = (1.0,)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    scale: float = Field(default=1.0, gt=0)
    channels: Literal["rgb", "bgr", "gray"] = "rgb"

    def __init__(self, /, **settings: Any):
        try:
            super().__init__(**settings)
        except ValidationError as error:
            # A position inside a union or tuple means nothing to a user, but the name of the setting does.
            faults = {": ".join([*map(str, fault["loc"][:1]), fault["msg"]]) for fault in error.errors()}
            what = "; ".join(sorted(faults)).replace("Value error, ", "")
            raise ConfigError(f"Preprocess cannot use these settings: {what}.") from None

    @field_validator("crop", mode="before")
    @classmethod
    def _square(cls, crop: Any) -> Any:
        return (crop, crop) if isinstance(crop, int) else crop

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Preprocess":
        allowed = (1,) if self.channels == "gray" else (1, 3)
        for name in ("mean", "std"):
            if (got := len(getattr(self, name))) not in allowed:
                wanted = " or ".join(map(str, allowed))
                raise ValueError(f"{name} must hold {wanted} numbers for {self.channels} images, got {got}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        return self

    def __call__(self, image: "Image.Image") -> "Tensor":
        """Return the network input for one picture: float32 ``(C, H, W)``, C = 1 for gray and 3 otherwise.

        Raises:
            DataError: the picture has 16 or 32 bits per channel, for which the value of white is unknown.
        """
        import torch

        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(
                f"the image has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits first"
            )
        image = _upright(image).convert("L" if self.channels == "gray" else "RGB")
        if (size := self._resized(*image.size)) != image.size:
            from PIL.Image import Resampling

            image = image.resize(size, Resampling[self.interpolation.upper()])
        if self.crop:
            image = _crop_centre(image, *self.crop)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = pixels.view(image.height, image.width, -1).permute(2, 0, 1).float().contiguous()
        if self.channels == "bgr":
            x = x.flip(0)
        x.div_(255 / self.scale)
        mean, std = self._mean_and_std()
        return x.sub_(mean).div_(std)

    def _mean_and_std(self) -> "tuple[Tensor, Tensor]":
        """Return both as float32 ``(C, 1, 1)`` or ``(1, 1, 1)``."""
        import torch

        mean, std = (torch.tensor(v, dtype=torch.float32, device="cpu").view(-1, 1, 1) for v in (self.mean, self.std))
        return mean, std

    def picture(self, x: "Tensor") -> "Image.Image":
        """Return the picture for a network's input ``(C, H, W)``, resized and cropped as it is; values are clipped.

        >>> from PIL import Image
        >>> preprocess = Preprocess.imagenet(size=32)
        >>> preprocess.picture(preprocess(Image.new("RGB", (36, 36), (10, 200, 30)))).getpixel((0, 0))
        (10, 200, 30)
        """
        from PIL import Image

        mean, std = self._mean_and_std()
        x = x.detach().float().cpu() * std + mean
        pixels = (x * (255 / self.scale)).round().clamp(0, 255).byte()
        if self.channels == "bgr":
            pixels = pixels.flip(0)
        return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous()).numpy())

    def __str__(self) -> str:
        """Return all settings in the terms of the command line's options, in the order in which they apply.

        >>> str(Preprocess.imagenet(224))
        'resize 256, crop 224x224, interpolation bilinear, channels rgb, scale 1, mean 0.485,0.456,0.406, \
std 0.229,0.224,0.225'
        """
        order = ("resize", "crop", "interpolation", "channels", "scale", "mean", "std")
        return ", ".join(f"{name} {_as_option(name, getattr(self, name))}" for name in order)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        match self.resize:
            case None:
                return width, height
            case (new_height, new_width):
                return new_width, new_height
            case int(side) if width <= height:
                return side, int(side * height / width)
            case int(side):
                return int(side * width / height), side

    @classmethod
    def imagenet(cls, size: int = 224) -> "Preprocess":
        """Return the usual evaluation transform of ImageNet networks: resize to ``size / 0.875``, crop, normalise.

        >>> Preprocess.imagenet(224).resize
        256
        """
        return cls(resize=math.floor(size / 0.875), crop=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)

    @classmethod
    def from_torchvision(cls, source: Any) -> "Preprocess":
        """Return the transform of torchvision weights (``ResNet50_Weights.DEFAULT``), or of a torchvision transform.

        Raises:
            ConfigError: ``source`` is neither, or a transform for another task than image classification.
        """
        from torch import nn

        transforms = getattr(source, "transforms", None)
        preset = transforms() if callable(transforms) and not isinstance(transforms, nn.Module) else source
        try:
            settings = {
                "resize": preset.resize_size[0],
                "crop": preset.crop_size[0],
                "mean": preset.mean,
                "std": preset.std,
                "interpolation": preset.interpolation.value.removesuffix("-exact"),
            }
        except (AttributeError, TypeError, IndexError):
            raise ConfigError(
                "Preprocess.from_torchvision expects weights for classification such as ResNet50_Weights.DEFAULT, or "
                f"their transforms(), got {source!r}. Give the settings one by one: Preprocess(resize=, crop=, ...)."
            ) from None
        return cls(**settings)

    @classmethod
    def from_timm(cls, model: "nn.Module") -> "Preprocess":
        """Return the evaluation transform in the pretrained configuration of a timm model.

        Raises:
            MissingExtraError: timm is not installed.
            ConfigError: the model has no such configuration, or one that this class cannot express.
        """
        timm_data = import_extra("zoo", "timm.data")
        if not getattr(model, "pretrained_cfg", None):
            raise ConfigError(
                f"{type(model).__name__} has no timm configuration (pretrained_cfg). "
                "Give the settings one by one instead: Preprocess(resize=, crop=, mean=, std=)."
            )
        config = timm_data.resolve_model_data_config(model)
        channels, *crop = config["input_size"]
        resize = [math.floor(side / config["crop_pct"]) for side in crop]
        squash = config["crop_mode"] == "squash"
        if config["crop_mode"] == "border" or (resize[0] != resize[1] and not squash) or channels not in (1, 3):
            raise ConfigError(
                f"timm's crop mode {config['crop_mode']!r} with input size {config['input_size']} is not supported. "
                "Preprocess the images with timm and pass the batches instead of a folder."
            )
        return cls(
            resize=tuple(resize) if squash else resize[0],
            crop=tuple(crop),
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            channels="gray" if channels == 1 else "rgb",
        )


def laid_over(known: Preprocess | None, given: Preprocess | Mapping[str, Any]) -> Preprocess:
    """Return ``given`` if it is complete, else ``known`` (or the defaults) with the fields that are ``given``."""
    if isinstance(given, Preprocess):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(
            "preprocess: expected a dsconv.data.Preprocess or a dictionary of its fields, got "
            f"{type(given).__name__}: Preprocess.from_torchvision and Preprocess.from_timm make one"
        )
    return Preprocess(**{**(known.model_dump() if known else {}), **given})


def _as_option(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if name in ("resize", "crop") else ",").join(_as_option(name, number) for number in value)
    return str(value).removesuffix(".0").lower()


def _upright(image: "Image.Image") -> "Image.Image":
    """Return ``image`` rotated according to its EXIF orientation; unchanged if that cannot be read."""
    from PIL.Image import Transpose

    if image.format == "TIFF":
        return image  # Pillow rotates it itself, and not all versions remove its orientation then
    try:
        turn = Transpose[_TURNS[image.getexif()[_ORIENTATION]]]
    except Exception:  # no orientation, or almost any error on damaged EXIF
        return image
    return image.transpose(turn)


def _crop_centre(image: "Image.Image", height: int, width: int) -> "Image.Image":
    left, top = image.width - width, image.height - height
    # torchvision first pads the short sides, the odd pixel to the right and below, and then crops the long ones with
    # Python's rounding of halves to even. Pillow's crop fills with black outside the image, so one call does both.
    x, y = (int(gap / 2) if gap < 0 else round(gap / 2) for gap in (left, top))
    return image.crop((x, y, x + width, y + height))
