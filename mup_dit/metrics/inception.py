"""The Inception network of 2015 that FID, sFID and IS are defined with.

torch-fidelity carries TensorFlow's graph with its weights; the layers here are its own, under the names of its weight
file. Differences from torchvision's network of the same name: average pools leave the border out, the last block pools
by the maximum, 1008 classes.

Source: specification 6. Spatial features are 7 channels of the first branch of block ``mixed_6``, torchvision's
``Mixed_6d``; class scores leave out the bias.

Dimensions: B images, C channels, H, W rows and columns of pixels, D = 2048 features, E = 2023 spatial features.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, DataError
from mup_dit.metrics.features import INCEPTION_NAMES, Features, Images, by_size

SIDE = 299  # pixels
FEATURES = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
WEIGHT_FILE = "weights-inception-2015-12-05-6726825d.pth"

logger = logging.getLogger(__name__)


class Inception(nn.Module):
    """Features of RGB images with values from 0 to 255; input of 299 x 299 pixels."""

    def __init__(self) -> None:
        from torch_fidelity import feature_extractor_inceptionv3 as blocks

        super().__init__()
        conv = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pool ``(B, D)``, spatial ``(B, E)``, class scores ``(B, 1008)``."""
        halve = nn.functional.max_pool2d
        x = (x_BCHW - 128) / 128
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))))
        x = self.Mixed_6d(x)
        # the first 192 channels are the first branch; TensorFlow flattens rows, columns, channels
        spatial_BE = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool_BD = x.mean(dim=(2, 3))
        return pool_BD, spatial_BE, pool_BD @ self.fc.weight.T


class InceptionFeatures:
    """ADM's evaluation: images are resized as TensorFlow 1 did.

    Args:
        weights: file, or hub name (``owner/name`` or ``owner/name/file``) of torch-fidelity's weights; None: its own
            download.
    """

    names = INCEPTION_NAMES

    def __init__(self, weights: str | None, device: torch.device) -> None:
        self.network, self.device = load_inception(weights).to(device), device
        self.name = f"inception ({weights or WEIGHT_FILE})"

    @torch.no_grad()
    def __call__(self, images: Images) -> Features:
        return Features(*by_size(images, self._resized, self.device))

    @torch.no_grad()
    def ready(self, x_BCHW: Tensor) -> Features:
        """Features of float images that have 299 x 299 pixels already."""
        return Features(*(part.float().cpu() for part in self.network(x_BCHW.to(self.device))))

    def _resized(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = x_BCHW.float().expand(-1, 3, -1, -1)  # grey images have three equal channels
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
        return self.network(x)


def load_inception(weights: str | None) -> Inception:
    """The network in evaluation mode.

    Raises: CheckpointError for weights that cannot be had, read, or are another network's.
    """
    state = _read_weights(weights)
    network = Inception()
    expected, found = network.state_dict(), dict(state)
    missing = expected.keys() - found.keys()
    # files differ in whether they carry the counters of normalisation
    missing = {key for key in missing if not key.endswith("num_batches_tracked")}
    wrong = {key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape}
    if missing or wrong:
        raise CheckpointError(
            f"inception={weights} holds no weights of torch-fidelity's Inception: {sorted(missing | wrong)[0]} is "
            f"missing or of another shape; use {WEIGHT_FILE} of torch-fidelity's release."
        )
    network.load_state_dict({key: value for key, value in found.items() if key in expected}, strict=False)
    return network.eval().requires_grad_(False)


def _read_weights(weights: str | None) -> dict[str, Tensor]:
    if weights is None:
        return _download()
    path = Path(weights).expanduser()
    if not path.is_file():
        if path.suffix or not 1 <= weights.count("/") <= 2:
            raise CheckpointError(f"inception={weights} does not exist; give {WEIGHT_FILE}, or null to download it.")
        path = _from_hub(weights)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors errors alike mean a file that is none
        raise CheckpointError(f"inception={path} cannot be read as weights ({str(error).splitlines()[0]}).") from error


def _download() -> dict[str, Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    try:
        return torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights of Inception cannot be downloaded ({error}); fetch {URL_INCEPTION_V3} elsewhere and "
            "give inception=FILE, or use features=digits for digits."
        ) from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, repository, *file = name.split("/")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file[0] if file else WEIGHT_FILE))
    except Exception as error:  # connection, gating, unknown names: many types, one remedy
        raise CheckpointError(
            f"inception={name} cannot be had from the hub ({str(error).splitlines()[0]}); give a local file."
        ) from error


def require_rgb(images: Images) -> None:
    """Raises: DataError for another number of channels than 1 or 3."""
    for image in images:
        if image.ndim != 3 or image.shape[2] not in (1, 3):
            raise DataError(f"an image has shape {image.shape}; metrics take (H, W, 3), or (H, W, 1) for grey.")
