"""What the tables of the step `sae` call its dictionaries and their metrics; read without torch."""

# The dictionary that the recipe's section describes; the others are its variants, by their names.
MAIN = "main"
# A latent that is active on a larger share of the activations is dense.
DENSE_FREQUENCY = 0.1
# A latent with a cosine above it to some latent of another seed's dictionary counts as found by both.
SHARED_COSINE = 0.7


def metric_name(dictionary: str, metric: str) -> str:
    """The name in the table `metrics`: the main dictionary's metrics go by their own name, a variant's by `VARIANT/metric`."""
    return metric if dictionary == MAIN else f"{dictionary}/{metric}"


def dictionary_of(name: str) -> tuple[str, str]:
    """(dictionary, metric) of a name in the table `metrics`."""
    dictionary, _, metric = name.rpartition("/")
    return dictionary or MAIN, metric
