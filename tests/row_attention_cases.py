"""What the tests of `row_attention` on the CPU and on a GPU have in common."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from embtune.kernels.row_attention import row_attention, text_bounds
from embtune.kernels.row_attention_plain import plain_row_attention


@dataclass(frozen=True)
class Case:
    """One shape of attention."""

    heads: int = 2
    groups: int = 2
    head_dim: int = 32
    distances: int | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def inputs(self, lengths: list[int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves q, k, v, with a bias or without, and the bounds of the texts."""
        generator = torch.Generator().manual_seed(len(lengths))
        tokens = sum(lengths)
        borders = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        starts, ends = text_bounds(borders, tokens)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

        shared = (tokens, self.groups, self.head_dim)
        parts = {"q_THD": draw(tokens, self.heads, self.head_dim), "k_TGD": draw(*shared), "v_TGD": draw(*shared)}
        if self.distances is not None:
            parts["bias_HR"] = draw(self.heads, self.distances, dtype=torch.float32)
        if "dropout" in self.settings:
            parts["seed"] = torch.tensor([-1234567890123], device=device)
        return {**parts, "starts_T": starts, "ends_T": ends}

    def gradients(self, function: object, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The output, and the gradients of a weighted sum of it."""
        out = function(**inputs, **self.settings)
        weights = torch.linspace(-3, 3, out.numel(), device=out.device, dtype=torch.float64).sin().view(out.shape)
        leaves = {name: part for name, part in inputs.items() if part.requires_grad}
        found = torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype))
        return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}

    def error(self, lengths: list[int], device: str, dtype: torch.dtype) -> dict[str, float]:
        """Distance of the kernels' results from those of the twin in float64, as a share of the latter's norms."""
        inputs = self.inputs(lengths, device, dtype)
        found = self.gradients(row_attention, inputs)
        wide = {
            name: part.detach().double().requires_grad_() if part.requires_grad else part
            for name, part in inputs.items()
        }
        expected = self.gradients(plain_row_attention, wide)
        assert found.keys() == expected.keys()
        return {name: float((found[name] - wanted).norm() / wanted.norm()) for name, wanted in expected.items()}


CASES = {
    "full": Case(),
    "scaled": Case(settings={"scale": 0.7}),
    "causal, grouped heads of 24": Case(groups=1, head_dim=24, settings={"causal": True}),
    "window": Case(head_dim=48, settings={"window": (5, 3)}),
    "causal window": Case(head_dim=16, settings={"window": (9, 2), "causal": True}),
    "bias": Case(distances=41),
    "dropout": Case(settings={"dropout": 0.3}),
    "everything": Case(4, 2, 64, 301, {"dropout": 0.1, "window": (40, -1), "causal": True, "scale": 0.2}),
}
