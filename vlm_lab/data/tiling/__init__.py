"""Tilings: which views of an image go through the encoder, and how many visual tokens come back.

A tiling is a pure function of the images' sizes, so placeholders can be laid out before any pixel is decoded. It offers

    layouts(sizes, view) -> [Layout]     of all images of one sample; sizes (width, height) in pixels
    video(frames, view) -> Layout        of a video with so many frames, if the tiling has a rule for videos
    render(image, layout, eye) -> views  the pictures that one encoder sees, in the layout's order
    check(view, encoders)                ValueError if these parts cannot work together
    marker, newline                      text around every run of tokens; whether a newline embedding is needed

What the model makes of a `Layout` (vlm_lab/batch.py) is vlm_lab/model/arrange.py.
"""

from vlm_lab.data.tiling.anyres import AnyRes, AnyResMax
from vlm_lab.data.tiling.base import Eye, Grid, Size, Tiling, View
from vlm_lab.data.tiling.native import Native
from vlm_lab.data.tiling.split import HD, Split4
from vlm_lab.data.tiling.whole import Crop, Pad, Squash, Unpad

__all__ = [
    "HD",
    "AnyRes",
    "AnyResMax",
    "Crop",
    "Eye",
    "Grid",
    "Native",
    "Pad",
    "Size",
    "Split4",
    "Squash",
    "Tiling",
    "Unpad",
    "View",
]
