"""What a file is by its first bytes, whatever its name; and the pictures that are not read, with the way out."""

from __future__ import annotations

HEAD_BYTES = 64  # of a file, enough to know it
LFS_POINTER = b"version https://git-lfs"  # a repository that was cloned without its large files

_CONVERT = "convert them to JPEG or PNG"
# A kind that is not read -> what to do about it.
WAYS_OUT = {
    "HEIC": f"{_CONVERT} (heif-convert of libheif, or ImageMagick with it)",
    "AVIF": f"{_CONVERT} (avifdec of libavif, or ImageMagick)",
    "JPEG XL": f"{_CONVERT} (djxl of libjxl)",
    "JPEG 2000": f"{_CONVERT} (opj_decompress of OpenJPEG, or ImageMagick)",
    "camera raw": "develop them to JPEG or PNG (dcraw_emu of libraw, darktable-cli)",
    "SVG": "draw them to PNG (rsvg-convert, inkscape)",
    "Photoshop": f"{_CONVERT} (ImageMagick)",
    "OpenEXR": "map their tones to 8 bits and write PNG (ImageMagick)",
    "DICOM": "window their values to 8 bits and write PNG (dcm2img of dcmtk)",
    "icon": f"{_CONVERT} (ImageMagick)",
    "Targa": f"{_CONVERT} (ImageMagick)",
    "PCX": f"{_CONVERT} (ImageMagick)",
    "JPEG XR": f"{_CONVERT} (JxrDecApp of jxrlib)",
}
_ENDINGS = {
    "HEIC": "heic heif hif heics heifs", "AVIF": "avif avifs", "JPEG XL": "jxl", "JPEG 2000": "jp2 j2k jpf jpx jpc j2c",
    "camera raw": "cr2 cr3 crw nef nrw arw srf sr2 dng orf rw2 raf pef srw 3fr iiq kdc dcr mrw x3f",
    "SVG": "svg svgz", "Photoshop": "psd psb", "OpenEXR": "exr", "DICOM": "dcm dicom", "icon": "ico icns cur",
    "Targa": "tga", "PCX": "pcx", "JPEG XR": "jxr wdp hdp",
}  # fmt: skip
UNREAD = {ending: kind for kind, endings in _ENDINGS.items() for ending in endings.split()}

_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "BIGTIFF"), (b"MM\0+", "BIGTIFF"),
    (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"8BPS", "Photoshop"), (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"II\xbc", "JPEG XR"), (b"IIRO", "camera raw"), (b"IIU\0", "camera raw"), (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"<svg", "SVG"),
)  # fmt: skip
_BRANDS = {"avif": "AVIF", "avis": "AVIF", "crx ": "camera raw"} | dict.fromkeys(
    ("heic", "heix", "hevc", "hevx", "heim", "heis", "mif1", "msf1"), "HEIC"
)
READ = ("PNG", "JPEG", "GIF", "TIFF", "BIGTIFF", "WEBP", "BMP")  # by content alone; PPM looks too much like a text


def signature(head: bytes) -> str | None:
    """The kind of picture that bytes start like: one of `READ` or `WAYS_OUT`; None for anything else."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and head[15:18] == bytes(3):
        return "BMP"  # two letters alone begin many a text
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin-1")
        if brand in ("mif1", "msf1") and b"avif" in head[16:HEAD_BYTES]:
            return "AVIF"
        return _BRANDS.get(brand)
    if head[8:10] == b"CR" and head[:4] == b"II*\0":
        return "camera raw"
    return next((kind for start, kind in _STARTS if head.startswith(start)), None)


def unread(head: bytes) -> str | None:
    """In words: why a picture of that content is not read, and what to do; None where nothing is known of it."""
    if head.startswith(LFS_POINTER):
        return "a pointer of Git LFS, not the picture: get the pictures by git lfs pull"
    kind = signature(head)
    if kind is None and b"<svg" in head[:1024]:
        kind = "SVG"
    return unread_words(kind) if kind in WAYS_OUT else None


def unread_words(kind: str) -> str:
    return f"{kind} pictures are not read: {WAYS_OUT[kind]}"
