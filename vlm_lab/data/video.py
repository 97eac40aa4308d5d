"""Videos: how many frames there are, and frames picked uniformly. Files are read with PyAV, drawn videos draw.

Source: LLaVA-OneVision's loader (`np.linspace(0, total - 1, limit, dtype=int)`). Frames are decoded from the start,
which every codec gets right; there is no seeking, no sampling by frame rate, and no sound. Rotation flags are ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image

from vlm_lab.data.sample import BadRecord, Video


def count_frames(video: Video, where: str, record: str) -> int:
    """Frames of a drawn video; coded frames of a file, counted without decoding (headers are often wrong about it)."""
    if not isinstance(video.content, Path):
        return len(video.content)
    with _opened(video.content, where, record) as container:
        count = sum(packet.size > 0 for packet in container.demux(video=0))
    if count == 0:
        raise BadRecord(where, record, f"video {video.content} has no frames")
    return count


def read_frames(video: Video, count: int, where: str, record: str) -> list[Image.Image]:
    """`count` RGB frames, from the first to the last, evenly spaced. Raises BadRecord if the file breaks off early."""
    wanted = np.linspace(0, count_frames(video, where, record) - 1, count).astype(int).tolist()
    if not isinstance(video.content, Path):
        return [video.content[index].draw() for index in wanted]
    with _opened(video.content, where, record) as container:
        decoded = zip(range(wanted[-1] + 1), container.decode(video=0), strict=False)
        frames = {index: frame.to_image() for index, frame in decoded if index in wanted}
    if len(frames) < count:
        raise BadRecord(where, record, f"video {video.content} breaks off before frame {wanted[len(frames)]}")
    return [frames[index] for index in wanted]


@contextmanager
def _opened(path: Path, where: str, record: str) -> Iterator[InputContainer]:
    """The opened file; whatever goes wrong until it is closed again becomes a `BadRecord`."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadRecord(where, record, f"{path} has no video stream")
            yield container
    except (FFmpegError, OSError) as error:
        raise BadRecord(where, record, f"video {path} cannot be decoded: {error}") from error
