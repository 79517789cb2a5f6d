"""The loading of base weights, slice by slice, into Megatron's shards."""
