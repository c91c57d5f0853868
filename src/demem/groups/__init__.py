"""Who goes against the shortcut: infer groups without group labels (the detector).

:func:`find_shortcut` probes the layers of a network for the class; :func:`infer_groups` crosses the class with what the
probe says, which gives every training and every held-out example a group; :func:`second_look` decides between a probe
made before training and one made after an epoch.  All are functions of tensors; nothing here knows a Trainer.
"""

from demem.groups.inferred import Groups, infer_groups, known_groups, largest_groups, second_look
from demem.groups.probe import ShortcutProbe, class_error, find_shortcut, probe_shortcut

__all__ = [
    "Groups",
    "ShortcutProbe",
    "class_error",
    "find_shortcut",
    "infer_groups",
    "known_groups",
    "largest_groups",
    "probe_shortcut",
    "second_look",
]
