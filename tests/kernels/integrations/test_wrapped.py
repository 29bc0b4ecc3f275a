"""A model of transformers, taken apart while others hold it: compiled, data parallel, sharded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from rlhf_kernels.integrations.transformers import take_apart  # noqa: E402
from tests.kernels.integrations.test_transformers import IDS, _quiet, made  # noqa: E402, F401


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole: bool):
    model = made("LlamaForCausalLM")
    want = take_apart(model).hidden_states(input_ids=IDS)
    if whole:
        with pytest.raises(ValueError, match="it is compiled as a whole, head included"):
            take_apart(torch.compile(model, backend="eager"))
        model.compile(backend="eager")
        with pytest.raises(ValueError, match="it is compiled as a whole, head included"):
            take_apart(model)
    else:
        model.model.compile(backend="eager")
        assert torch.allclose(take_apart(model).hidden_states(input_ids=IDS), want, rtol=1e-5, atol=1e-6)


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel(alone: None):
    model = made("LlamaForCausalLM")
    want = take_apart(model).hidden_states(input_ids=IDS)
    parts = take_apart(nn.parallel.DistributedDataParallel(model))
    assert parts.hidden_states(input_ids=IDS).equal(want)
    assert parts.weight is model.lm_head.weight


def test_a_sharded_head_is_refused(alone: None):
    from torch.distributed.fsdp import fully_shard

    model = made("LlamaForCausalLM")
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be taken apart: its head is sharded"):
        take_apart(model)
