"""Check of the pickle in a checkpoint before torch reads it.

`torch.load(weights_only=True)` runs no code, but it allocates what the pickle asks for, hashes keys of any nesting, and
does not compare the size of a storage with the bytes in the file. Here the pickle is interpreted without building
anything: it may rebuild dense tensors of the usual types, each within its storage, and ordered dicts.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

ITEM_BYTES = {
    "torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2, "torch BFloat16Storage": 2,
    "torch LongStorage": 8, "torch IntStorage": 4, "torch ShortStorage": 2, "torch CharStorage": 1,
    "torch ByteStorage": 1, "torch BoolStorage": 1,
}  # fmt: skip
REBUILD, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
CALLABLES = (REBUILD, PARAMETER, "collections OrderedDict")
MAX_STEPS = 300_000  # of the pickle; a checkpoint of a large network has 30,000
MAX_BYTES = 1 << 25
MAX_TUPLE = 4096  # values in a tuple and the tuples in it


class PickleError(ValueError):
    """The pickle contains something other than what training writes; the message is a phrase."""


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    numel: int


class _Tuple(NamedTuple):
    items: tuple[Any, ...]
    values: int  # in it and the tuples in it


MARK, ORDERED_DICT, OTHER = object(), object(), object()
# The opcodes that torch.save writes, and their few alternatives; none of them duplicates or discards an object.
PUT, GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE")
INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
CHANGES = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
OTHERS = ("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_DICT", "EMPTY_LIST", "SHORT_BINSTRING")


def check_archive(path: Path) -> None:
    """Check the zip archive of a checkpoint and the pickle in it.

    Raises:
        PickleError: The archive is not one that torch.save writes, or its pickle is not one that training writes.
        zipfile.BadZipFile: The file is not a zip, or is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("compressed")  # torch.save stores its entries uncompressed
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("entries larger than the archive")
        sizes = {entry.filename: entry.file_size for entry in entries}
        roots = {name.partition("/")[0] for name in sizes}
        if len(sizes) < len(entries) or len(roots) != 1 or min(entry.header_offset for entry in entries):
            raise PickleError("its archive is not one that torch.save writes")  # readers may disagree about it
        root = roots.pop()
        if sizes.get(f"{root}/data.pkl", MAX_BYTES + 1) > MAX_BYTES:
            raise PickleError("its pickle is missing or too large")
        data = archive.read(f"{root}/data.pkl")
    prefix = f"{root}/data/"
    check_pickle(data, {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)})


def check_pickle(data: bytes, storages: dict[str, int]) -> None:
    """Check a pickle.

    Args:
        data: The pickle.
        storages: Bytes of each storage in the archive, by its name.

    Raises:
        PickleError: The pickle is not one that training writes.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step > MAX_STEPS:
                raise PickleError(f"its pickle has more than {MAX_STEPS:,} steps")
            _run(opcode, argument, stack, memo, storages)
    except PickleError:
        raise
    except (IndexError, KeyError, ValueError) as error:
        raise PickleError("its pickle is damaged") from error


def _run(opcode: Any, argument: Any, stack: list[Any], memo: dict[int, Any], storages: dict[str, int]) -> None:
    name = opcode.name
    if name in PUT:
        memo[argument] = stack[-1]
    elif name in GET:
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(MARK)
    elif name == "GLOBAL":
        stack.append(_Global(argument))
    elif name in TUPLES:
        items = _pop(opcode, stack)
        values = 1 + sum(item.values if isinstance(item, _Tuple) else 1 for item in items)
        if values > MAX_TUPLE:
            raise PickleError(f"it contains a tuple of more than {MAX_TUPLE:,} values")
        stack.append(_Tuple(tuple(items), values))
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop(), storages))
    elif name == "REDUCE":
        stack.append(_call(*_pop(opcode, stack)))
    elif name in CHANGES:
        changed, *_ = _pop(opcode, stack)
        if name == "BUILD" and changed is not ORDERED_DICT:
            raise PickleError("it contains an object with attributes")
        stack.append(changed)
    elif name in INTEGERS or name == "BINUNICODE":
        stack.append(argument)
    elif name in OTHERS:
        stack.append(OTHER)
    elif name == "STOP":
        stack.pop()
    elif name != "PROTO":
        raise PickleError(f"its pickle has the step {name}, which torch.save does not write")


def _pop(opcode: Any, stack: list[Any]) -> list[Any]:
    """Pop and return what an opcode takes, which may be everything after a mark and an object before it."""
    if pickletools.markobject not in opcode.stack_before:
        return [stack.pop() for _ in opcode.stack_before][::-1]
    popped = []
    while (item := stack.pop()) is not MARK:
        popped.append(item)
    if opcode.stack_before[0] is not pickletools.markobject:
        popped.append(stack.pop())
    return popped[::-1]


def _storage(identifier: Any, storages: dict[str, int]) -> _Storage:
    """Check ('storage', type, name, device, number of items)."""
    items = identifier.items if isinstance(identifier, _Tuple) else ()
    kind = items[1].name if len(items) == 5 and isinstance(items[1], _Global) else None
    if kind not in ITEM_BYTES:
        raise PickleError(f"it contains a tensor of an unsupported type, {str(kind).replace(' ', '.')}")
    name, numel = items[2], items[4]
    if type(name) is not str or type(numel) is not int or storages.get(name) != numel * ITEM_BYTES[kind]:
        raise PickleError(f"the size of its storage {name} is not that in the archive")
    return _Storage(numel)


def _call(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, _Global) else "an object"
    if name not in CALLABLES:
        raise PickleError(f"it contains {name.replace(' ', '.')}")
    items = arguments.items if isinstance(arguments, _Tuple) else (None,)
    if name == REBUILD:
        _require_dense(items)
    elif name == PARAMETER and not items:
        raise PickleError("it contains a parameter without a tensor")
    elif name not in (REBUILD, PARAMETER) and items:
        raise PickleError("it contains an ordered dict in an unsupported form")
    return OTHER if name in (REBUILD, PARAMETER) else ORDERED_DICT


def _require_dense(arguments: tuple[Any, ...]) -> None:
    """Check (storage, offset, size, stride, ...): every item of the tensor has its own place in the storage."""
    if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise PickleError("it contains a tensor without a storage")
    storage, offset, *shape = arguments[:4]
    if type(offset) is not int or offset < 0 or not all(isinstance(part, _Tuple) for part in shape):
        raise PickleError("it contains a tensor in an unsupported form")
    size, stride = (part.items for part in shape)
    if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in (*size, *stride)):
        raise PickleError("it contains a tensor in an unsupported form")
    if 0 in size:
        return
    last = offset
    reach = 1  # places that the dimensions of smaller strides cover
    for step, count in sorted(zip(stride, size, strict=True)):
        if count > 1 and step < reach:
            raise PickleError("it contains a tensor whose items share memory (an expanded tensor)")
        last += (count - 1) * step
        reach += (count - 1) * step
    if last >= storage.numel:
        raise PickleError("it contains a tensor that is larger than its storage")
