"""What is written beside published models."""

from __future__ import annotations

MODELS = "models.json"


NOT_A_DEVICE = (
    "Not a medical device: for research. Its answers can be wrong and sound sure; nobody should "
    "be diagnosed or treated by them, and no clinician replaced."
)
