"""Measurements of generated ops and the records that are kept of them."""
