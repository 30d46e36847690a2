"""Linear least squares from a stream: sums of products in float64, so that no feature is ever stored."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geometry.backbone import Grid
from geometry.latent import Connector

Total = Callable[[Tensor], Tensor]
"""A tensor of this rank -> its sum over all ranks."""


class Moments:
    """Sums over rows of x, y, x'x, x'y and y^2: all that a linear fit of y = x w + b, and its error, need."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.rows = 0
        self.x, self.y, self.yy = (torch.zeros(n, dtype=torch.float64) for n in (inputs, outputs, outputs))
        self.xx, self.xy = (torch.zeros(inputs, n, dtype=torch.float64) for n in (inputs, outputs))

    def add(self, x: Float[Tensor, "N inputs"], y: Float[Tensor, "N outputs"]) -> None:
        """Count some rows; the first ones decide the device."""
        x, y = x.double(), y.double()
        for name, new in {"x": x.sum(0), "y": y.sum(0), "yy": (y * y).sum(0), "xx": x.mT @ x, "xy": x.mT @ y}.items():
            setattr(self, name, getattr(self, name).to(new.device) + new)
        self.rows += len(x)

    def __add__(self, other: "Moments") -> "Moments":
        """Of both streams."""
        both = Moments(0, 0)
        for name in vars(self):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def reduced(self, total: Total) -> "Moments":
        """Of the streams of all ranks."""
        whole = Moments(0, 0)
        for name in ("x", "y", "yy", "xx", "xy"):
            setattr(whole, name, total(getattr(self, name)))
        whole.rows = int(total(self.x.new_tensor([self.rows])).item())
        return whole

    def columns(self, start: int, stop: int) -> "Moments":
        """Of some outputs only."""
        part = Moments(0, 0)
        part.rows, part.x, part.xx = self.rows, self.x, self.xx
        part.y, part.yy, part.xy = self.y[start:stop], self.yy[start:stop], self.xy[:, start:stop]
        return part

    def solve(self, ridge: float) -> tuple[Float[Tensor, "inputs outputs"], Float[Tensor, " outputs"]]:
        """Weight and bias that minimise the mean squared error + ridge * (mean variance of x) * |weight|^2.

        The intercept is free: centring x and y takes it out of the penalty. The penalty is relative, so that it means
        the same whatever the unit of x.

        Raises:
            ValueError: too few rows, or inputs that depend on each other, for ridge = 0.
        """
        mean_x, mean_y = self.x / self.rows, self.y / self.rows
        cov = self.xx / self.rows - torch.outer(mean_x, mean_x)
        cov.diagonal().add_(ridge * cov.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(cov)
        if failed:
            raise ValueError(f"{self.rows} rows do not determine {len(mean_x)} inputs; give more clips or raise ridge")
        weight = torch.cholesky_solve(self.xy / self.rows - torch.outer(mean_x, mean_y), factor)
        return weight, mean_y - mean_x @ weight

    def errors(
        self, weight: Float[Tensor, "inputs outputs"], bias: Float[Tensor, " outputs"]
    ) -> tuple[Float[Tensor, " outputs"], Float[Tensor, " outputs"]]:
        """Sums over rows of (y - x w - b)^2 and of (y - mean y)^2."""
        fitted = ((self.xx @ weight) * weight).sum(0) + 2 * bias * (self.x @ weight) + self.rows * bias**2
        crossed = (self.xy * weight).sum(0) + bias * self.y
        return self.yy - 2 * crossed + fitted, self.yy - self.y**2 / self.rows


class ConnectorFit:
    """The closed-form connector, from a stream of latents and the tokens that belong to them.

    Only the shape of the connector's convolution is used, its padding included: D may be any width, such as the tokens
    of several blocks side by side, whose solutions then share one x'x.
    """

    def __init__(self, connector: Connector, D: int) -> None:
        self.connector, self.D = connector, D
        inputs = connector.conv.weight[0].numel()
        self._per_phase = connector.split**2 * D
        self._first = Moments(inputs, self._per_phase)  # latent 0 has its last phase only
        self._rest = Moments(inputs, self._per_phase * connector.phases)

    @torch.no_grad()
    def add(
        self, z: Float[Tensor, "B C L h w"], tokens: Float[Tensor, "B T rows columns D"], grid: Grid | None = None
    ) -> None:
        """Count some clips; they may differ in size and length from those before.

        Raises:
            ValueError: tokens of other frames or of another grid than the connector makes of these latents.
        """
        frames, grid = (
            self.connector.latent.frames(z.shape[2], self.connector.mode),
            grid or self.connector.grid(*z.shape[3:]),
        )
        if list(tokens.shape) != [len(z), len(frames), *grid, self.D]:
            raise ValueError(f"tokens must be {[len(z), len(frames), *grid, self.D]}, got {list(tokens.shape)}")
        windows, targets = self.connector.windows(z.double(), grid), self.connector.targets(tokens)
        for index, (x, y) in enumerate(zip(windows, targets, strict=True)):
            (self._rest if index else self._first).add(x, y)

    def reduce(self, total: Total) -> None:
        """Count what all ranks have counted."""
        self._first, self._rest = self._first.reduced(total), self._rest.reduced(total)

    def solve(self, ridge: float = 1e-4) -> tuple[Float[Tensor, "inputs outputs"], Float[Tensor, " outputs"]]:
        """Weight and bias, outputs in the order of the convolution's channels (phase, row, column, D)."""
        weights, biases = zip(*(part.solve(ridge) for part in self._parts()), strict=True)
        return torch.cat(weights, dim=1), torch.cat(biases)

    def errors(
        self, weight: Float[Tensor, "inputs outputs"], bias: Float[Tensor, " outputs"]
    ) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Squared error of a solution on the clips counted here, and variance, of each of the D outputs (both sums).

        1 - error / variance is R^2; held-out if the solution comes from other clips.
        """
        start, sums = 0, []
        for part in self._parts():
            stop = start + part.y.numel()
            sums.append(torch.stack(part.errors(weight[:, start:stop], bias[start:stop])))
            start = stop
        error, variance = torch.cat(sums, dim=1).unflatten(1, (-1, self.D)).sum(1)
        return error, variance

    def _parts(self) -> list[Moments]:
        """The regressions that have rows of their own: all phases but the last, and the last."""
        last = self._per_phase * (self.connector.phases - 1)
        if self._rest.rows == 0:  # single frames only: they know the last phase
            if last:
                raise ValueError('the time mode "phases" cannot be fitted on single frames; give longer clips')
            return [self._first]
        tail = self._rest.columns(last, last + self._per_phase) + self._first
        return [self._rest.columns(0, last), tail] if last else [tail]


@torch.no_grad()
def set_connector(conv: nn.Conv3d, weight: Float[Tensor, "inputs outputs"], bias: Float[Tensor, " outputs"]) -> None:
    """Write a solution into a connector's convolution."""
    assert conv.bias is not None
    conv.weight.copy_(weight.mT.reshape(conv.weight.shape))
    conv.bias.copy_(bias)
