"""How often attribute values occur together in WBCAtt, as counts over its 6,151 training records.

Source: WBCAtt (Tsutsui et al., NeurIPS 2023), github.com/apple2373/wbcatt, commit
ad255b80f6d56b9f72508b04466c3c4a2c95c97b, MIT, training split without byte-identical duplicates. Kept per
label: the pairs and conditionals with the largest mutual information (at most 0.18 nats within a label, so
the rest is taken as independent given the label). `testbed.cells` samples from these.
"""

LABEL_COUNTS = {"Neutrophil": 1984, "Eosinophil": 1867, "Monocyte": 828, "Basophil": 736, "Lymphocyte": 736}

TABLES: dict[str, dict] = {
    "Basophil": {
        "size_shape": {
            ("small", "round"): 512,
            ("big", "round"): 143,
            ("big", "irregular"): 46,
            ("small", "irregular"): 35,
        },
        "ratio_colour": {("low", "light blue"): 728, ("high", "light blue"): 4, ("low", "purple blue"): 4},
        "granules": {("coarse", "purple", "yes"): 733, ("small", "purple", "yes"): 3},
        "chromatin": {"densely": 736},
        "texture": {"clear": 736},
        "nucleus_given_shape": {
            "round": {
                "irregular": 267,
                "segmented-bilobed": 189,
                "segmented-multilobed": 127,
                "unsegmented-band": 45,
                "unsegmented-round": 19,
                "unsegmented-indented": 8,
            },
            "irregular": {
                "irregular": 36,
                "segmented-bilobed": 24,
                "segmented-multilobed": 9,
                "unsegmented-band": 9,
                "unsegmented-indented": 2,
                "unsegmented-round": 1,
            },
        },
        "vacuole_given_shape": {"round": {"no": 653, "yes": 2}, "irregular": {"no": 81}},
    },
    "Eosinophil": {
        "size_shape": {
            ("big", "round"): 1059,
            ("small", "round"): 660,
            ("big", "irregular"): 126,
            ("small", "irregular"): 22,
        },
        "ratio_colour": {("low", "light blue"): 1864, ("low", "blue"): 2, ("high", "light blue"): 1},
        "granules": {("round", "red", "yes"): 1866, ("nil", "red", "yes"): 1},
        "chromatin": {"densely": 1853, "loosely": 14},
        "texture": {"clear": 1867},
        "nucleus_given_shape": {
            "round": {
                "segmented-bilobed": 1215,
                "segmented-multilobed": 309,
                "unsegmented-band": 173,
                "unsegmented-indented": 12,
                "unsegmented-round": 5,
                "irregular": 5,
            },
            "irregular": {
                "segmented-bilobed": 85,
                "segmented-multilobed": 29,
                "unsegmented-band": 22,
                "irregular": 10,
                "unsegmented-round": 2,
            },
        },
        "vacuole_given_shape": {"round": {"no": 1715, "yes": 4}, "irregular": {"no": 147, "yes": 1}},
    },
    "Lymphocyte": {
        "size_shape": {
            ("small", "round"): 496,
            ("small", "irregular"): 234,
            ("big", "irregular"): 5,
            ("big", "round"): 1,
        },
        "ratio_colour": {
            ("high", "blue"): 438,
            ("high", "purple blue"): 226,
            ("low", "purple blue"): 35,
            ("high", "light blue"): 13,
            ("low", "blue"): 13,
            ("low", "light blue"): 11,
        },
        "granules": {("nil", "nil", "no"): 735, ("small", "purple", "yes"): 1},
        "chromatin": {"densely": 721, "loosely": 15},
        "texture": {"frosted": 469, "clear": 267},
        "nucleus_given_shape": {
            "round": {"unsegmented-round": 401, "unsegmented-indented": 93, "irregular": 3},
            "irregular": {"unsegmented-round": 174, "unsegmented-indented": 46, "irregular": 19},
        },
        "vacuole_given_shape": {"round": {"no": 497}, "irregular": {"no": 239}},
    },
    "Monocyte": {
        "size_shape": {
            ("big", "irregular"): 451,
            ("big", "round"): 267,
            ("small", "round"): 93,
            ("small", "irregular"): 17,
        },
        "ratio_colour": {
            ("low", "purple blue"): 359,
            ("low", "blue"): 337,
            ("low", "light blue"): 70,
            ("high", "blue"): 42,
            ("high", "purple blue"): 20,
        },
        "granules": {("nil", "nil", "no"): 826, ("small", "pink", "yes"): 2},
        "chromatin": {"loosely": 487, "densely": 341},
        "texture": {"frosted": 729, "clear": 99},
        "nucleus_given_shape": {
            "round": {
                "unsegmented-indented": 332,
                "unsegmented-round": 21,
                "irregular": 6,
                "segmented-bilobed": 1,
            },
            "irregular": {
                "unsegmented-indented": 272,
                "irregular": 161,
                "unsegmented-round": 33,
                "segmented-bilobed": 2,
            },
        },
        "vacuole_given_shape": {"round": {"no": 310, "yes": 50}, "irregular": {"yes": 338, "no": 130}},
    },
    "Neutrophil": {
        "size_shape": {
            ("big", "round"): 808,
            ("small", "round"): 721,
            ("big", "irregular"): 374,
            ("small", "irregular"): 81,
        },
        "ratio_colour": {("low", "light blue"): 1983, ("high", "light blue"): 1},
        "granules": {
            ("small", "pink", "yes"): 1934,
            ("small", "purple", "yes"): 46,
            ("coarse", "purple", "yes"): 2,
            ("small", "nil", "yes"): 1,
            ("nil", "nil", "no"): 1,
        },
        "chromatin": {"densely": 1962, "loosely": 22},
        "texture": {"clear": 1984},
        "nucleus_given_shape": {
            "round": {
                "unsegmented-band": 1084,
                "segmented-bilobed": 256,
                "segmented-multilobed": 169,
                "irregular": 14,
                "unsegmented-round": 4,
                "unsegmented-indented": 2,
            },
            "irregular": {
                "unsegmented-band": 251,
                "segmented-bilobed": 120,
                "segmented-multilobed": 80,
                "unsegmented-round": 2,
                "irregular": 2,
            },
        },
        "vacuole_given_shape": {"round": {"no": 1499, "yes": 30}, "irregular": {"no": 417, "yes": 38}},
    },
}
