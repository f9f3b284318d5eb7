"""The size of the tiny pipeline, and options with which it is sparse."""

import zoo

DEFAULTS = {
    "kind": ["video", "image"], "height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 2,
    "guidance": 4.0, "max_sequence_length": zoo.TEXT, "multiple": 16, "frames_rule": "4n+1",
}
# with these, attention really is sparse at this size
SPARSE = {"dense_steps": 0, "min_tokens": 1, "tile": (1, 1, 2), "density": 0.4, "max_density": 1.0,
          "sink": 0}
