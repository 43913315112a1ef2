"""What makes a command run under FSDP2 between CPU processes, and proves that it does."""

from __future__ import annotations

FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}  # fmt: skip
# accelerate offers FSDP on accelerators alone; torch's own FSDP2 works between CPUs as well.
ON_CPU = """
import accelerate.state
from accelerate.utils import DistributedType
plain = accelerate.state.AcceleratorState.__init__
def patched(self, *arguments, fsdp_plugin=None, **options):
    plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
accelerate.state.AcceleratorState.__init__ = patched
"""
SHARDED = """
from gossamer.finetune import bookkeeping
begin = bookkeeping.Bookkeeping.on_train_begin
def check(self, args, state, control, **more):
    begin(self, args, state, control, **more)
    network = self.trainer.network
    assert all(hasattr(p, "placements") for p in network.parameters()), "not sharded"
    assert all(hasattr(m, "placements") for m in self.trainer.guard._entries.values()), "masks are not"
bookkeeping.Bookkeeping.on_train_begin = check
"""
