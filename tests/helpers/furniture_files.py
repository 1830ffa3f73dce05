"""A catalogue of furniture in the format of Sweet Home 3D, with a box as every mesh."""

import io
import zipfile

import numpy as np
from PIL import Image

BOX = """\
mtllib box.mtl
v -1 0 -2
v 1 0 -2
v 1 4 -2
v -1 4 -2
v -1 0 2
v 1 0 2
v 1 4 2
v -1 4 2
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl paint
f 1 4 3 2
f 1 2 6 5
f 2 3 7 6
f 3 4 8 7
f 4 1 5 8
usemtl picture
f -4/1 -3/2 -2/3 -1/4
"""
PAINT = "newmtl paint\nKd 0.2 0.4 0.6\nnewmtl picture\nKd 1 1 1\nmap_Kd stripes.png\n"

# name, category, width, depth, height in centimetres, and other properties
PIECES = [
    *[(name, "Bedroom", 140, 200, 60, {}) for name in ("Bed", "Child bed", "Iron bed")],
    *[(name, "Living room", 45, 50, 90, {}) for name in ("Chair", "Oak chair", "Stool", "Office chair")],
    *[(name, "Living room", 180, 80, 80, {}) for name in ("Sofa", "Couch", "Corner sofa")],
    *[(name, "Living room", 120, 70, 70, {"dropOnTopElevation": "70"}) for name in ("Table", "Desk", "Glass table")],
    *[(name, "Bedroom", 90, 40, 180, {}) for name in ("Wardrobe", "Bookcase", "Cupboard")],
    *[
        (name, "Doors and windows", 90, 15, 205, {"doorOrWindow": "true"})
        for name in ("Door", "Glass door", "Double door")
    ],
    *[
        (name, "Doors and windows", 100, 15, 100, {"elevation": "90"})
        for name in ("Window", "Arched window", "Big window")
    ],
    *[(name, "Characters", 50, 40, 170, {}) for name in ("Female", "Male", "Girl", "Boy")],
    *[(name, "Kitchen", 60, 60, 85, {}) for name in ("Oven", "Fridge", "Dryer machine")],
    *[(name, "Bathroom", 70, 60, 50, {}) for name in ("Washbasin", "Bidet", "Bath")],
    *[(name, "Miscellaneous", 20, 20, 20, {}) for name in ("Box", "Teapot", "Vase", "Plant")],
]
LEFT_OUT = [
    ("Palm tree", "Exterior", 200, 200, 200, {}),
    ("Garage door", "Doors and windows", 250, 20, 200, {}),
    ("Ring", "Bedroom", 2, 2, 1, {}),
    ("Round carpet", "Living room", 80, 80, 0.5, {}),
    ("Rails", "Miscellaneous", 1000, 100, 20, {}),
]


def write_furniture(folder):
    """Write one catalogue of PIECES and LEFT_OUT; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["license=Public domain"]
    with zipfile.ZipFile(folder / "boxes.sh3f", "w") as archive:
        for number, (name, category, width, depth, height, more) in enumerate([*PIECES, *LEFT_OUT], 1):
            place = f"boxes/{name.replace(' ', '_')}"
            values = {"name": name, "category": category, "model": f"/{place}/box.obj", "width": width, "depth": depth}
            lines += [f"{key}#{number}={value}" for key, value in {**values, "height": height, **more}.items()]
            archive.writestr(f"{place}/box.obj", BOX)
            archive.writestr(f"{place}/box.mtl", PAINT)
            archive.writestr(f"{place}/stripes.png", stripes())
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
    return folder / "boxes.sh3f"


def stripes():
    """A picture that is black on the left and white on the right."""
    content = io.BytesIO()
    Image.fromarray(np.repeat(np.array([[0, 0, 255, 255]], dtype=np.uint8), 4, axis=0)).save(content, "png")
    return content.getvalue()
