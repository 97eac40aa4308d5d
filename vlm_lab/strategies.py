"""Where parameters, gradients and optimizer states live: Lightning's strategies, on any device.

Everything here that gathers sharded tensors is a collective: every process must call it, in the same order. ZeRO-1 is
not offered (its consolidated checkpoints lack frozen weights, DeepSpeed issue 5439).
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm_lab.config import Trainer as Options
from vlm_lab.files import in_place


def strategy(options: Options) -> Any:
    """What `trainer.strategy` names; "auto" is one device, or ddp for several."""
    timeout, cpu = timedelta(seconds=options.timeout_s), options.accelerator == "cpu"
    backend = "gloo" if cpu else "nccl"
    if options.strategy.startswith("zero"):
        return Zero(options, timeout=timeout, process_group_backend=backend)
    if options.strategy == "fsdp":
        sizes = {"data_parallel_size": options.devices, "tensor_parallel_size": 1}
        return FSDP(**sizes, save_distributed_checkpoint=False, timeout=timeout, process_group_backend=backend)
    if options.devices == 1:
        return "auto"
    return DDPStrategy(timeout=timeout, process_group_backend=backend)


class Zero(DeepSpeedStrategy):
    """ZeRO-2 or ZeRO-3, with states (and ZeRO-3's parameters) kept in main memory for `_offload`.

    Offloaded states are updated by PyTorch's fused AdamW, so that no extension has to be compiled. On the CPU it talks
    through gloo, which Lightning does not foresee and DeepSpeed supports.
    """

    def __init__(self, options: Options, **kwargs: Any) -> None:
        self.cpu_processes = options.devices if options.accelerator == "cpu" else None
        if self.cpu_processes:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
        stage, offload = (3 if "zero3" in options.strategy else 2), options.strategy.endswith("offload")
        parameters = offload and stage == 3
        super().__init__(stage=stage, offload_optimizer=offload, offload_parameters=parameters, **kwargs)
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False

    def setup_environment(self) -> None:
        if self.cpu_processes is None:
            super().setup_environment()
            return
        self.parallel_devices = [torch.device("cpu", index) for index in range(self.cpu_processes)]
        super(DeepSpeedStrategy, self).setup_environment()  # DeepSpeedStrategy's own insists on CUDA

    def save_checkpoint(self, checkpoint: dict, filepath: Any, storage_options: Any = None) -> None:
        """A folder that appears under its name when every process has written its part."""
        path = Path(self.broadcast(filepath))
        partial = path.with_name(f"{path.name}.partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            in_place(partial, path)


class FSDP(ModelParallelStrategy):
    """PyTorch's fully sharded data parallelism, the newer one (`fully_shard`).

    Every parameter is sharded by itself, so frozen and trained ones mix; the module says what is gathered together
    (`configure_model`). Checkpoints are whole, in one file, as under DDP.
    """


def shards_weights(trainer: Trainer) -> bool:
    """Whether a forward pass of any part of the model is one of all processes together."""
    return isinstance(trainer.strategy, FSDP) or getattr(trainer.strategy, "zero_stage_3", False)


def leave_inputs(trainer: Trainer) -> None:
    """Batches hold integers alone: there is nothing to convert, and Lightning cannot look into frozen dataclasses."""
    setattr(trainer.strategy.precision_plugin, "convert_input", lambda batch: batch)  # noqa: B010


def optimized(trainer: Trainer) -> list[nn.Parameter]:
    """The model's parameters that the optimizer steps (ZeRO's own groups hold flat shards of them)."""
    (optimizer,) = trainer.optimizers
    for groups in ("bit16_groups", "fp16_groups"):  # ZeRO-2's, ZeRO-3's
        if hasattr(optimizer, groups):
            return [parameter for group in getattr(optimizer, groups) for parameter in group]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of everything in the state dict, wherever its shards are."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        yield name, whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a parameter that trains under ZeRO its fp32 original, not the rounded copy in use."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.full_tensor()
    if not is_sharded(tensor):
        return tensor.detach()
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if tensor.requires_grad and (original := safe_get_full_fp32_param(tensor)) is not None:
        return original.detach().view(getattr(tensor, "ds_shape", tensor.shape))
    with GatheredParameters([tensor]):
        return tensor.detach().clone()


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


class Consolidate(Callback):
    """When training ends, the first process's model gets whole tensors in main memory; last of the callbacks."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in list(pl_module.parameters()):
            if is_sharded(parameter):
                tensor = whole(parameter)
                if not trainer.is_global_zero:
                    continue
                if isinstance(parameter, DTensor):
                    replace_parameter(
                        pl_module, parameter, nn.Parameter(tensor.to("cpu", copy=True), parameter.requires_grad)
                    )
                else:
                    parameter.data = tensor.to("cpu", copy=True)


def replace_parameter(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put `new` wherever `old` is (tied weights have several places)."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, name, new)
