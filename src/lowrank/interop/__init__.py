"""Files and frameworks of others, and adapters as files: export, load, switch."""

from lowrank.interop.adapter_bank import AdapterBank, AdapterInfo, export_adapter, read_adapter, write_adapter
from lowrank.interop.lora_vit import read_lora_vit

__all__ = ["AdapterBank", "AdapterInfo", "export_adapter", "read_adapter", "read_lora_vit", "write_adapter"]
