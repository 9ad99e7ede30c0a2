"""timm's model contract, written once: patch embedding, stages, norm, pooling, classifier.

Annotations are evaluated here: torch.fx copies that of `forward` into the graph, where TorchScript wants a type.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from kernels.layer_norm import LayerNorm
from models.layers import Block, NeighborhoodAttention, alternate, drop_path_rates, init_weights, to_channels_first


class Backbone(nn.Module):
    """Base of every model. Subclasses build `patch_embed`, the stages and `norm`, then call `_finish`.

    The stages are a Sequential under the name that the published files give it, `stages_name`. Features are
    `[batch, height, width, num_features]` (`output_fmt` says so to timm).
    """

    stages_name = "layers"
    output_fmt = "NHWC"
    __jit_unused_properties__ = ("stages",)

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        # Declared here and not in the class, where TorchScript would read them as its own types.
        self.patch_embed: nn.Module
        self.layers: nn.Sequential
        self.norm: nn.Module
        self.num_features = 0
        self.head_hidden_size = 0
        self.feature_info: list[dict[str, Any]] = []

    def _finish(self, num_features: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = num_features
        self.norm = LayerNorm(num_features)
        self._make_head(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_weights)

    def _make_head(self, global_pool: str) -> None:
        self.global_pool, self.head = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @property
    def stages(self) -> nn.Sequential:
        """The stages, whatever the published files call them."""
        stages = getattr(self, self.stages_name)
        assert isinstance(stages, nn.Sequential)
        return stages

    # What timm's optimisers, schedules and fine-tuning ask of a model.

    def no_weight_decay(self) -> set[str]:
        """Biases by position and LayerScale: the original code decayed the former by accident."""
        return {name for name, _ in self.named_parameters() if name.endswith(("rpb", "gamma1", "gamma2"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names, from the image to the head; every block is a group (`coarse`: every stage)."""
        return {"stem": r"^patch_embed", "blocks": [(rf"^{self.stages_name}\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing what it computed."""
        for module in self.modules():
            if isinstance(module, Block):
                module.grad_checkpointing = enable

    def set_attn_backend(self, backend: str | None) -> None:
        """Compute every attention with this one of `kernels`' backends; None lets `kernels` choose per problem."""
        for module in self.modules():
            if isinstance(module, NeighborhoodAttention):
                module.backend = backend

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of `num_classes` (0: none) and, if given, another pooling ('' for none)."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool)
        self.head.apply(init_weights)
        self.head.to(device=like.device, dtype=like.dtype)
        self.head.train(self.training)
        self.global_pool.train(self.training)

    # Forward passes.

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """The features of a stage."""
        return stage(x)

    def _advance(self, stage: nn.Module, x: Tensor) -> Tensor:
        """From the features of a stage to the next stage's input."""
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of several stages, before any downsampling that follows them.

        indices: the last n stages (int), those listed, or all (None). norm: apply the final norm to the last stage's.
        stop_early: run no stage behind the last one asked for. output_fmt: "NCHW" (a view in channels-last memory)
        or "NHWC". Returns `(final features, intermediates)`, or the intermediates alone with `intermediates_only`;
        the final features are those of the last stage run, normalised if it is the model's last.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt = {output_fmt!r}: it is 'NCHW' or 'NHWC'")
        take, last_taken = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        end = last_taken if stop_early else last
        intermediates = []
        x = self.patch_embed(x)
        for index, stage in enumerate(list(self.stages)[: end + 1]):
            x = self._run(stage, x)
            if index in take:
                taken = self.norm(x) if norm and index == last else x
                intermediates.append(to_channels_first(taken) if output_fmt == "NCHW" else taken)
            if index < end:
                x = self._advance(stage, x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if end == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Drop what the stages in `indices` do not need; returns them, counted from the front."""
        take, last_taken = feature_take_indices(len(self.stages), indices)
        cut = last_taken < len(self.stages) - 1
        setattr(self, self.stages_name, self.stages[: last_taken + 1])
        if cut:
            self.num_features = self.feature_info[last_taken]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[batch, in_chans, height, width]` to normalised features `[batch, h, w, num_features]`."""
        # By name, which NAT overrides: TorchScript compiles no property that gives a module.
        return self.norm(self.layers(self.patch_embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits `[batch, num_classes]`, or to what the classifier sees with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Level(nn.Module):
    """Blocks at one resolution, then the way down to the next (an Identity at the last level)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


def pyramid_blocks(
    embed_dim: int,
    depths: Sequence[int],
    dilations: Sequence[int | Sequence[int]] | None,
    drop_path_rate: float,
    **block: Any,
) -> list[list[Block]]:
    """The blocks of each level: widths double, drop path rises over all of them. `block` goes to every `Block`.

    Raises ValueError when `dilations` does not fit `depths`.
    """
    per_level = (1,) * len(depths) if dilations is None else tuple(dilations)
    if len(per_level) != len(depths):
        raise ValueError(f"dilations has {len(per_level)} entries for {len(depths)} levels; give one per level")
    rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
    return [
        [
            Block(embed_dim * 2**level, dilation=dilation, drop_path=next(rates), **block)
            for dilation in alternate(per_level[level], depth, f"dilations[{level}]")
        ]
        for level, depth in enumerate(depths)
    ]


class PyramidBackbone(Backbone):
    """A backbone whose stages are `Level`s, each at half the resolution and twice the width of the one before."""

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(stage, Level)
        return stage.blocks(x)

    def _advance(self, stage: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(stage, Level)
        return stage.downsample(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        name = self.stages_name
        blocks = [
            # 99999 joins a match to the group before it: the way down belongs to the level's last block.
            (rf"^{name}\.(\d+)\.downsample", (99999,)),
            (rf"^{name}\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        if coarse:
            blocks = [(rf"^{name}\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        last = self.stages[-1]
        assert isinstance(last, Level)
        last.downsample = nn.Identity()
        return take
