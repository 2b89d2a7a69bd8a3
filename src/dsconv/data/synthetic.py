"""Random images for measures that only compare a network with itself."""

import torch
from torch import Tensor

from dsconv.data.preprocess import PHOTOGRAPH_DEVIATION, PHOTOGRAPH_MEAN, Preprocess
from dsconv.errors import ConfigError


def synthetic_images(count: int, preprocess: Preprocess, *, seed: int = 0) -> Tensor:
    """Return noise images, prepared like photographs: float32 ``(count, C, H, W)``, mostly grey.

    The amplitude of the noise decreases with the spatial frequency as ``1/f``, like that of photographs (D. J. Field,
    "Relations between the statistics of natural images and the response properties of cortical cells", JOSA A, 1987).

    Raises:
        ConfigError: ``preprocess`` has neither a crop nor a size to resize to, so that the input size is unknown.

    >>> synthetic_images(2, Preprocess(crop=32, mean=0.5)).shape
    torch.Size([2, 3, 32, 32])
    """
    from PIL import Image

    match preprocess.resize, preprocess.crop:
        case int(side), _:
            height = width = side
        case ((height, width), _) | (None, (height, width)):
            pass
        case _:
            raise ConfigError(
                "preprocess: expected a crop or a size to resize to, which sets the size of synthetic images, "
                "got neither: use Preprocess(crop=224, ...), or pass images"
            )
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(
        torch.randn(count, 3, height, width, generator=generator, dtype=torch.float32, device="cpu")
    )
    down = torch.fft.fftfreq(height, dtype=torch.float32, device="cpu")
    across = torch.fft.rfftfreq(width, dtype=torch.float32, device="cpu")
    frequency = torch.hypot(down[:, None], across)
    frequency[0, 0] = torch.inf  # no mean
    x = torch.fft.irfft2(spectrum / frequency, s=(height, width))
    x += 2 * x.mean(1, keepdim=True)
    x *= PHOTOGRAPH_DEVIATION / x.std((1, 2, 3), keepdim=True).clamp_min(1e-9)  # a single pixel has no deviation
    pixels = (x + PHOTOGRAPH_MEAN).clamp_(0, 1).mul_(255).byte().permute(0, 2, 3, 1)
    return torch.stack([preprocess(Image.fromarray(image.contiguous().numpy())) for image in pixels])
