"""The safetensors format by hand: eight bytes of length, a JSON header, the numbers."""

import json
import struct
from pathlib import Path

Values = list[float] | list[list[float]] | float


def write_tensors(path: Path, tensors: dict[str, Values]) -> None:
    """Write nested lists as float32 tensors."""
    header, data = {}, b""
    for name, values in tensors.items():
        rows = values if isinstance(values, list) and values and isinstance(values[0], list) else None
        flat = [number for row in rows for number in row] if rows else values if isinstance(values, list) else [values]
        shape = [len(rows), len(rows[0])] if rows else [len(flat)] if isinstance(values, list) else []
        numbers = struct.pack(f"<{len(flat)}f", *flat)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Shape and numbers of each float32 tensor."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            begin, end = entry["data_offsets"]
            found[name] = (entry["shape"], list(struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])))
    return found
