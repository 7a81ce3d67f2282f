"""Files and frameworks of others, and adapters as files: export, load, switch."""

from typing import TYPE_CHECKING

from lowrank.infra.lazy import attributes

if TYPE_CHECKING:
    from lowrank.interop.adapter_bank import AdapterBank, AdapterInfo, export_adapter, read_adapter, write_adapter
    from lowrank.interop.lora_vit import read_lora_vit
    from lowrank.interop.peft import export_peft, read_peft, write_peft
    from lowrank.interop.peft_difference import export_difference, write_difference
    from lowrank.interop.transformers_trainer import MergeOnSave, trainer

__getattr__ = attributes(__name__, __file__)

__all__ = [
    "AdapterBank",
    "AdapterInfo",
    "MergeOnSave",
    "export_adapter",
    "export_difference",
    "export_peft",
    "read_adapter",
    "read_lora_vit",
    "read_peft",
    "trainer",
    "write_adapter",
    "write_difference",
    "write_peft",
]
