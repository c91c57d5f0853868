"""Words for the short names that rows of a comparison carry: methods, tiers, held-out sources, data sets."""

from __future__ import annotations

METHODS = {
    "erm": "plain training (ERM)",
    "class_balanced": "class-balanced training",
    "cb_llr": "class-balanced last-layer retraining (CB-LLR)",
    "dfr": "deep feature reweighting (DFR)",
    "dfr_l2": "DFR with an L2 head",
    "dpe": "diversified prototypical ensemble (DPE)",
    "neuron_tune": "NeuronTune, head on training data",
    "neuron_tune_held_out": "NeuronTune, head on held-out data",
    "example_tied_dropout": "example-tied dropout",
    "ags": "AGS",
    "silent_majority": "Silent Majority, magnitude, logits",
    "silent_majority_softmax": "Silent Majority, magnitude, softmax",
    "silent_majority_gradient": "Silent Majority, gradient, logits",
    "silent_majority_gradient_softmax": "Silent Majority, gradient, softmax",
    "jtt": "just train twice (JTT)",
    "afr": "automatic feature reweighting (AFR)",
    "xrm_dro": "XRM with GroupDRO",
    "group_weights": "group reweighting",
    "group_dro": "GroupDRO",
    "demem": "demem",
    "demem_as_trained": "demem, training balanced and nothing else",
    "demem_no_units": "demem without its unit-level part",
    "demem_random_units": "demem with as many random units",
    "demem_magnitude_units": "demem with as many of the largest units",
}

TIERS = {
    "T0": "no group label seen",
    "T1": "group labels of the validation set, for selection only",
    "T2": "group labels of the held-out data, inside the method",
    "T3": "group labels of the training set",
}

HELD_OUT = {
    "none": "nothing held out",
    "iid": "held out: a slice of the training set",
    "val": "held out: the validation set",
}

HELD_OUT_MEANINGS = {
    "none": "A method trains on the training set alone; held-out labels may only select an epoch or a setting.",
    "iid": "A method may also train on a random slice of the training set, on which the network was not trained. This "
    "is what an ordinary user has.",
    "val": "A method may also train on the benchmark's validation set, which is often balanced over the groups and so "
    "gives them away.",
}

DATA = {
    "digits": "Digits in coloured ink",
    "digits_balanced": "Digits, no correlation",
    "colored_mnist": "Colored MNIST",
    "dominoes": "Dominoes, 95%",
    "dominoes99": "Dominoes, 99%",
    "dominoes_shirts": "Dominoes, pullover and shirt",
    "dominoes_vit": "Dominoes, small ViT",
    "waterbirds": "Waterbirds, MobileNetV2",
    "waterbirds_lite0": "Waterbirds, EfficientNet-Lite0",
    "waterbirds_full": "Waterbirds, whole network",
    "solar": "Solar cells",
    "sentiment": "Film reviews",
}


def method_name(method: str) -> str:
    """The written-out name; of a method that is not ours to name, its own with spaces.

    >>> method_name("dfr"), method_name("my_method")
    ('deep feature reweighting (DFR)', 'my method')
    """
    return METHODS.get(method, method.replace("_", " "))


def short_name(method: str) -> str:
    """The abbreviation that the written-out name has in brackets, or that name.

    >>> short_name("dfr"), short_name("group_dro")
    ('DFR', 'GroupDRO')
    """
    name = method_name(method)
    return name[name.rindex("(") + 1 : -1] if name.endswith(")") else name


def data_name(data: str) -> str:
    """The written-out name, or the data set's own with spaces."""
    return DATA.get(data, data.replace("_", " "))
