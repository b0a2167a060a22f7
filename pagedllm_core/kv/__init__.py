"""KV memory: block ids, tables, content addresses, tensors."""
