"""Who goes against the shortcut: infer groups without group labels (the detector).

:func:`find_shortcut` probes the layers of a network for the class; :func:`infer_groups` crosses the class with what the
probe says, which gives every training and every held-out example a group; :func:`second_look` decides between a probe
made before training and one made after an epoch.  All are functions of tensors; nothing here knows a Trainer.

:func:`judge` says whether the probe's mistakes are a minority, wrong labels or hard examples, of the data set and of
each example; it needs a second predictor (:func:`second_opinion`), which :func:`closer_look` makes.  :func:`detect`
does all of it for a network and a loader, with no training.
"""

from demem.groups.detect import Detection, detect, probed_sites
from demem.groups.inferred import Groups, infer_groups, known_groups, largest_groups, second_look
from demem.groups.probe import ShortcutProbe, class_error, find_shortcut, probe_shortcut
from demem.groups.verdict import Verdict, closer_look, is_confirmed, judge, second_opinion, sketch, wrong_labels

__all__ = [
    "Detection",
    "Groups",
    "ShortcutProbe",
    "Verdict",
    "class_error",
    "closer_look",
    "detect",
    "find_shortcut",
    "infer_groups",
    "is_confirmed",
    "judge",
    "known_groups",
    "largest_groups",
    "probe_shortcut",
    "probed_sites",
    "second_look",
    "second_opinion",
    "sketch",
    "wrong_labels",
]
