"""RIFE v3.8 (Huang et al., ECCV 2022): the frame halfway between two, by estimated flow.

Three blocks refine, coarse to fine, the flow from the middle to either frame and the mask that
blends the two warped frames. The weights are those of the published ``flownet.pkl`` (IFNet_HDv3);
its fourth block only taught the others during training.

Shapes: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mla_study.errors import UserError

WIDTH = 90
SCALES = (4.0, 2.0, 1.0)
"""How much the blocks shrink their input, at scale 1."""
_TEACHER = "block_tea."
_FAR = 16  # pixels at the first block's scale: with more motion all blocks look from farther off


class Block(nn.Module):
    """Two frames [B, 3, H, W] each, mask and flow to a change of flow [B, 4] and of mask [B, 1]."""

    def __init__(self, channels: int = 11, width: int = WIDTH) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_conv(channels, width // 2, 2), _conv(width // 2, width, 2))
        for index in range(4):
            self.add_module(f"convblock{index}", nn.Sequential(_conv(width), _conv(width)))
        self.conv1, self.conv2 = _up(width, 4), _up(width, 1)

    def forward(
        self, x: Float[Tensor, "B 7 H W"], flow: Float[Tensor, "B 4 H W"], scale: float
    ) -> tuple[Float[Tensor, "B 4 H W"], Float[Tensor, "B 1 H W"]]:
        """What to add to flow (in pixels) and mask, found at 1 / scale of the size."""
        small = torch.cat([_resized(x, 1 / scale), _resized(flow, 1 / scale) / scale], 1)
        seen = self.conv0(small)
        for index in range(4):
            seen = seen + self.get_submodule(f"convblock{index}")(seen)
        return _resized(self.conv1(seen), scale) * scale, _resized(self.conv2(seen), scale)


class Rife(nn.Module):
    """The middle frame of two."""

    def __init__(self) -> None:
        super().__init__()
        self.block0, self.block1, self.block2 = Block(), Block(), Block()

    def forward(
        self, first: Float[Tensor, "1 3 H W"], second: Float[Tensor, "1 3 H W"], scale: float = 1.0
    ) -> Float[Tensor, "1 3 H W"]:
        """The frame in between.

        One pair at a time, for the largest flow of all decides at which scales it is looked for.

        Args:
            first, second: RGB in [0, 1], H and W multiples of :func:`multiple`.
            scale: of the flow's search: 2 and 4 for small frames, 0.5 for very large ones.
        """
        flow = torch.zeros_like(torch.cat([first, first[:, :1]], 1))
        mask = torch.zeros_like(first[:, :1])
        scales = [s / scale for s in SCALES]
        far, _ = self.block0(torch.cat([first, second, mask], 1), flow, 2 * scales[0])
        if float(far.abs().max()) > _FAR * scales[0]:
            scales = [2 * s for s in scales]
        left, right = first, second
        for block, at in zip(self._blocks(), scales, strict=True):
            more_flow, more_mask = block(torch.cat([left, right, mask], 1), flow, at)
            flow, mask = flow + more_flow, mask + more_mask
            left, right = warped(first, flow[:, :2]), warped(second, flow[:, 2:])
        share = torch.sigmoid(mask)
        return left * share + right * (1 - share)

    def _blocks(self) -> Sequence[Block]:
        return self.block0, self.block1, self.block2


def multiple(scale: float) -> int:
    """What height and width of the frames must be multiples of."""
    return max(32, int(32 / scale))


def scale_for(height: int, width: int) -> float:
    """The scale of the flow's search that suits a size.

    Of real clips shrunk to 24 to 240 pixels a side, 4 interpolated best below 64 pixels and 2 up to
    240; 0.5 is what its authors advise for very large frames.
    """
    side = min(height, width)
    if side < 64:
        return 4.0
    if side < 240:
        return 2.0
    return 0.5 if side >= 1440 else 1.0


def warped(
    frame: Float[Tensor, "B C H W"], flow: Float[Tensor, "B 2 H W"]
) -> Float[Tensor, "B C H W"]:
    """``frame`` at each pixel's position plus ``flow`` (x, y), bilinear, edges continued."""
    height, width = frame.shape[2:]
    rows = torch.linspace(-1, 1, height, device=frame.device, dtype=frame.dtype)
    columns = torch.linspace(-1, 1, width, device=frame.device, dtype=frame.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    unit = flow.new_tensor([(width - 1) / 2, (height - 1) / 2])
    grid = torch.stack([x, y], -1) + flow.permute(0, 2, 3, 1) / unit
    return F.grid_sample(frame, grid, "bilinear", "border", align_corners=True)


def load_rife(path: Path) -> Rife:
    """The network with the weights of a file, in eval mode.

    Raises:
        UserError: the file is damaged, or not of this network.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(held, Mapping):
            raise TypeError("it holds no dictionary of weights")
        named = {str(name).removeprefix("module."): value for name, value in held.items()}
        net = Rife()
        net.load_state_dict({k: v for k, v in named.items() if not k.startswith(_TEACHER)})
    except Exception as error:
        # unpickling a damaged file raises what it likes
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold RIFE v3.8's weights ({what}): get it anew") from None
    return net.eval()


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(
        x, scale_factor=factor, mode="bilinear", align_corners=False, recompute_scale_factor=False
    )


def _conv(channels: int, width: int | None = None, stride: int = 1) -> nn.Sequential:
    width = width or channels
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1), nn.PReLU(width))


def _up(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
        nn.PReLU(width // 2),
        nn.ConvTranspose2d(width // 2, channels, 4, 2, 1),
    )
