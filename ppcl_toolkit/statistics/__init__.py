"""The equations of detection: least squares and CKA, on tensors alone."""
