"""The words of attribute tables: SkinCon and CBIS-DDSM."""

from __future__ import annotations

SKINCON = (
    "Vesicle", "Papule", "Macule", "Plaque", "Abscess", "Pustule", "Bulla", "Patch", "Nodule", "Ulcer", "Crust", "Erosion", "Excoriation",
    "Atrophy", "Exudate", "Purpura/Petechiae", "Fissure", "Induration", "Xerosis", "Telangiectasia", "Scale", "Scar", "Friable", "Sclerosis",
    "Pedunculated", "Exophytic/Fungating", "Warty/Papillomatous", "Dome-shaped", "Flat topped", "Brown(Hyperpigmentation)", "Translucent",
    "White(Hypopigmentation)", "Purple", "Yellow", "Black", "Erythema", "Comedo", "Lichenification", "Blue", "Umbilicated", "Poikiloderma",
    "Salmon", "Wheal", "Acuminate", "Burrow", "Gray", "Pigmented", "Cyst",
)


def word(concept: str) -> str:
    """A concept as it is written in text: "Brown(Hyperpigmentation)" is "brown (hyperpigmentation)"."""
    return concept.lower().replace("(", " (")


VALUES: dict[str, tuple[str, ...]] = {
    "mass_shape": (
        "architectural distortion", "asymmetric breast tissue", "focal asymmetric density", "irregular", "lobulated", "lymph node", "oval", "round",
    ),
    "mass_margins": ("circumscribed", "ill defined", "microlobulated", "obscured", "spiculated"),
    "calc_type": (
        "amorphous", "coarse", "dystrophic", "eggshell", "fine linear branching", "large rodlike", "lucent centered", "milk of calcium", "pleomorphic",
        "punctate", "round and regular", "skin", "vascular",
    ),
    "calc_distribution": ("clustered", "diffusely scattered", "linear", "regional", "segmental"),
    "abnormality_type": ("calcification", "mass"),
    "pathology": ("benign", "malignant"),
}
