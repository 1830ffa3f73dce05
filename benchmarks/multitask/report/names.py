"""What a setting is called in titles, and its files."""

TITLES = {
    "fashion+mnist": "Clothes and digits",
    "fashion+mnist-adam-1-20": "Clothes and digits, losses 1:20",
    "fashion+mnist-adam-1-100": "Clothes and digits, losses 1:100",
    "multifashion": "Two clothes",
    "multimnist": "Two digits",
    "questions": "Six questions",
    "rooms": "Rooms, rendered",
    "trunk": "ImageNet trunk, three heads",
    "yeast": "Yeast, 14 labels",
}


def title(setting: str) -> str:
    """Return a setting's title; a setting without one is called by its name."""
    return TITLES.get(setting, setting)


def file_name(setting: str) -> str:
    """Return a name for files and addresses, where a plus sign means a space to some."""
    return setting.replace("+", "-and-")
