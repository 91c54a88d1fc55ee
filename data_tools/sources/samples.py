"""One position of a source to one sample: read, check, and where asked make smaller."""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_tools import rle
from data_tools.sample_format import Record, parse_record
from data_tools.sources.checks import check_jpeg, check_record
from data_tools.sources.coco import record_from_coco
from data_tools.sources.listing import Entry, Layout

WARN_REENCODED = "image was not JPEG and is re-encoded"
WARN_VANISHED = "mask too small to survive the resizing, dropped"


@dataclass(frozen=True)
class Conversion:
    """What is done to a sample on its way. With the defaults no byte of an image changes."""

    layout: Layout
    resize_long_side: int = 0  # pixels; 0 keeps the size; nothing is ever enlarged
    resize_short_side: int = 0
    jpeg_quality: int = 95  # of images that are re-encoded
    reencode: bool = False  # PNG, WebP, ... to JPEG; otherwise they are bad samples
    keep_crowds: bool = True  # COCO's iscrowd regions
    jpeg_check: Literal["decode", "header"] = "decode"  # decode every image, or read header and end only


@dataclass(frozen=True)
class Sample:
    """A valid sample, ready to be written."""

    record: Record
    jpeg: bytes
    warnings: Counter[str]


def read_sample(entry: Entry, conversion: Conversion) -> Sample:
    """Raises `ValueError` with the reason if the position holds no valid sample, `OSError` if the disk fails."""
    if entry.problem:
        raise ValueError(entry.problem)
    if entry.image is None:
        raise ValueError("JSON without JPEG")
    if entry.annotations is None and conversion.layout != "images":
        raise ValueError("JPEG without JSON")

    jpeg, warnings = entry.image.read(), Counter[str]()
    if conversion.reencode and not jpeg.startswith(b"\xff\xd8"):
        jpeg = reencode(jpeg, conversion.jpeg_quality, upright=conversion.layout == "images")
        warnings[WARN_REENCODED] += 1
    height, width = check_jpeg(jpeg, conversion.jpeg_check == "decode")
    record = _read_record(entry, conversion, height, width, warnings)
    warnings += check_record(record, height, width) if conversion.layout != "images" else Counter()

    new_height, new_width = smaller_size(height, width, conversion)
    if (new_height, new_width) != (height, width):
        jpeg = reencode(jpeg, conversion.jpeg_quality, (new_width, new_height), conversion.layout == "images")
        new_height, new_width = check_jpeg(jpeg, decode=False)  # turned, perhaps
        record = resize_record(record, new_height, new_width, warnings)
    return Sample(record, jpeg, warnings)


def _read_record(entry: Entry, conversion: Conversion, height: int, width: int, warnings: Counter[str]) -> Record:
    """The record as the source has it, or made from what it has."""
    if conversion.layout == "images":
        return Record(image_id_of(entry.key), width, height, f"{entry.key}.jpg", [])
    data = entry.annotations if isinstance(entry.annotations, bytes) else entry.annotations.read()
    if conversion.layout == "coco":
        return record_from_coco(data, entry.key, height, width, conversion.keep_crowds, warnings)
    record = parse_record(data)
    if record.key != entry.key:
        raise ValueError(f"JSON is of another image: file_name {record.file_name!r} in {entry.key}.json")
    return record


def image_id_of(key: str) -> int:
    """63-bit hash of a key, for images whose source has no ids."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def smaller_size(height: int, width: int, conversion: Conversion) -> tuple[int, int]:
    """Size that brings the long or the short side to what is asked; never larger than before."""
    scale = 1.0
    if conversion.resize_long_side:
        scale = min(scale, conversion.resize_long_side / max(height, width))
    if conversion.resize_short_side:
        scale = min(scale, conversion.resize_short_side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def reencode(data: bytes, quality: int, size: tuple[int, int] | None = None, upright: bool = False) -> bytes:
    """Any image as an RGB JPEG, its stored pixels brought to (width, height) `size` if given: Lanczos, antialiased.

    The result has no EXIF, so a rotation is applied now or never. `upright`: it is; otherwise not, since masks are
    given on the pixels as stored, and the trainer decodes them so too.
    """
    try:
        orientation = Image.open(io.BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
        if data.startswith(b"\xff\xd8"):  # the decoder the trainer has, so grey and CMYK look alike in both
            image = Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        else:
            image = Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("image does not decode: unknown format") from error  # its own text holds an address
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image does not decode: {error}") from error
    if size is not None:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if orientation != 1:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resize_record(record: Record, height: int, width: int, warnings: Counter[str]) -> Record:
    """The record of the resized image. Masks are resampled as runs; one that loses its last pixel is dropped."""
    scale_x, scale_y = width / record.width, height / record.height
    annotations = []
    for annotation in record.annotations:
        runs = rle.resample_nearest(rle.parse(annotation["segmentation"]), height, width)
        if rle.area(runs) == 0:
            warnings[WARN_VANISHED] += 1
            continue
        x, y, crop_width, crop_height = annotation["crop_box"]
        moved: dict[str, Any] = {
            "bbox": sa1b_box(runs),
            "area": int(rle.area(runs)),
            "segmentation": rle.to_coco(runs),
            "point_coords": [[px * scale_x, py * scale_y] for px, py in annotation["point_coords"]],
            "crop_box": [x * scale_x, y * scale_y, crop_width * scale_x, crop_height * scale_y],
        }
        annotations.append({**annotation, **moved})
    return Record(record.image_id, width, height, record.file_name, annotations)


def sa1b_box(runs: rle.Runs) -> list[float]:
    """SA-1B's box: x, y, then width and height of inclusive maxima, one pixel short of the extent."""
    x, y, width, height = rle.box(runs)
    return [float(x), float(y), float(width - 1), float(height - 1)]
