"""The stages compute: tensors in, tensors out."""
