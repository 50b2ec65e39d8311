"""Calls on device arrays, and how one that is like an earlier call is done again.

The second call of a kind is rehearsed: done on arrays at made-up addresses, on a device that only writes down the steps
it is told. A number in these steps that lies among the made-up addresses is an address, to be replaced by that of each
later call; every other number is the same in all calls of the kind. A call in place is rehearsed the first time: all
that it takes is compiled before a kernel is started that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from nbloss.cuda import choices, device
from nbloss.cuda.arrays import DeviceArray, DeviceView, Layout, delivered, extent, parameters
from nbloss.cuda.device import Home, arrived, layout_of, stream_pointer
from nbloss.cuda.intrinsics import VECTOR_BYTES
from nbloss.output import APART
from nbloss.plans import FLOATS, MOST_PLANS
from nbloss.problem import Array

Solve = Callable[[list[Any]], tuple[Any, Any]]  # makes loss and gradient of arguments, those on the device as views
Layouts = dict[int, Layout]  # of the arguments on the device, by number
Key = tuple[Any, ...]

_plans: dict[Key | None, Plan | None] = {}  # None: there was one call


def call(entry: str, solve: Solve, names: Sequence[str], values: list[Any], there: list[int]) -> tuple[Any, Any]:
    """What `solve` makes of arguments of which those `there` are arrays on a device, as a user receives it."""
    stream = values[names.index("stream")] if "stream" in names else None
    pointer = stream_pointer(stream)
    layouts = {k: layout_of(names[k], values[k], pointer) for k in there}
    number = layouts[there[0]].number
    for k in there:
        if layouts[k].number != number:
            raise TypeError(APART.format(names[k]))
    home = Home(number, stream)
    key = _key(entry, names, values, layouts)
    try:
        return _made(key, solve, names, values, layouts, home)
    finally:  # a call that raises may have started something too
        # What is done next with an array comes after the call, of which the owner of its memory knows nothing. A user
        # who gives a stream takes charge of what other libraries do.
        told = stream is not None
        theirs = dict.fromkeys(_stream_of(values[k]) for k in there if not told or isinstance(values[k], DeviceArray))
        if None in theirs:  # memory that is let go of may be used again at once, on a stream that nobody knows
            home.wait()
        else:
            for other in theirs:
                home.precede(cast(int, other))


def _stream_of(value: Any) -> int | None:
    """The stream that an array's owner works on, if that is known."""
    theirs: int | None = value.stream if isinstance(value, DeviceArray) else device.memory().stream_of(value)
    return theirs


def _made(
    key: Key | None, solve: Solve, names: Sequence[str], values: list[Any], layouts: Layouts, home: Home
) -> tuple[Any, Any]:
    plan = _plans.get(key)
    if plan is None and key is not None and (key in _plans or _is_in_place(_out(names, layouts), layouts)):
        plan = _kept(key, _rehearsed(solve, names, values, layouts))
    made = None
    if plan is not None:
        with device.memory().on(home.number):
            made = plan.done(home, layouts.values(), values)
    if made is None:
        views = {k: arrived(names[k], values[k], layout, home) for k, layout in layouts.items()}
        loss, gradient = solve([views.get(k, value) for k, value in enumerate(values)])
        made = delivered(loss), delivered(gradient)
        if key is not None and plan is None:
            _kept(key, None)
    return made


def _kept(key: Key, plan: Plan | None) -> Plan | None:
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


# --- which calls are of a kind ----------------------------------------------------------------------------------

PLAIN = {str, int, bool, type(None)}
SPAN = 1 << 48  # from one made-up base to the next: no number of a call but an address is as large


def _key(entry: str, names: Sequence[str], values: Sequence[Any], layouts: Layouts) -> Key | None:
    """What a call has in common with those that differ from it in addresses, and in what lies there, alone.

    What was checked and worked out for one of them holds for all. None where it takes a closer look.
    """
    parts: list[Any] = [entry, choices.forced, *names]
    for k, value in enumerate(values):
        if k in layouts:
            layout = layouts[k]
            if 0 in layout.shape or any(abs(step) >= SPAN for step in layout.strides or ()):
                return None
            parts += (layout[1:6], layout.address % VECTOR_BYTES)  # all but the address and what keeps it
        elif names[k] != "stream":
            kind = type(value)
            if kind in FLOATS:
                value = float(value).hex()  # for 0.0 and -0.0 are equal, and NaN is not
            elif kind not in PLAIN or (kind is int and abs(value) >= SPAN):
                return None
            parts += (kind, value)
    if 0 not in layouts:
        return None
    out = _out(names, layouts)
    if out is not None:
        in_place = _is_in_place(out, layouts)
        parts.append(in_place)
        if not all(_are_apart(layouts[out], layouts[k]) for k in layouts if k != out and not (k == 0 and in_place)):
            return None
    return tuple(parts)


def _out(names: Sequence[str], layouts: Layouts) -> int | None:
    """The number of the argument that is written to."""
    k = names.index("out") if "out" in names else None
    return k if k in layouts else None


def _is_in_place(out: int | None, layouts: Layouts) -> bool:
    return out is not None and layouts[out][:4] == layouts[0][:4]


def _are_apart(a: Layout, b: Layout) -> bool:
    (a_low, a_high), (b_low, b_high) = (extent(*layout[:3], layout.dtype.itemsize) for layout in (a, b))
    return a_high <= b_low or b_high <= a_low


# --- plans ------------------------------------------------------------------------------------------------------

Place = tuple[int, int]  # an address: number of a base, and bytes from there
Step = Callable[[Home, list[int]], object]  # what is done, given the addresses of bases; True: there is a fault


class Result(NamedTuple):
    """An array that a call makes."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]


class Plan(NamedTuple):
    """The steps of a call. Bases are its arguments on the device first, then memory of these sizes."""

    sizes: list[int]
    steps: list[Step]
    results: tuple[Result | int | None, Result | int | None]  # an int: the argument that it is written to

    def done(self, home: Home, layouts: Iterable[Layout], values: Sequence[Any]) -> tuple[Any, Any] | None:
        """The results, or None if there is a fault, which only the call itself describes."""
        bases = [layout.address for layout in layouts]
        given = len(bases)
        owners = []
        for size in self.sizes:
            address, owner = home.allocate(size)
            bases.append(address)
            owners.append(owner)
        for step in self.steps:
            if step(home, bases):
                return None

        def received(result: Result | int | None) -> Any:
            if not isinstance(result, Result):
                return None if result is None else values[result]
            (base, offset), shape, strides, dtype = result
            owner = owners[base - given]
            return DeviceArray(Layout(bases[base] + offset, shape, strides, dtype, False, home.number, owner), home)

        loss, gradient = self.results
        return received(loss), received(gradient)


def _rehearsed(solve: Solve, names: Sequence[str], values: Sequence[Any], layouts: Layouts) -> Plan:
    """The plan of a call that has a key."""
    home = Rehearsal(layouts[0].number)
    places = {k: home.bases[home.base(layout.address % VECTOR_BYTES)] for k, layout in layouts.items()}
    out = _out(names, layouts)
    if out is not None and _is_in_place(out, layouts):
        places[out] = places[0]
    views = {}
    for k, layout in layouts.items():
        views[k] = arrived(names[k], values[k], layout._replace(address=places[k]), home)
    loss, gradient = solve([views.get(k, value) for k, value in enumerate(values)])

    def result(view: Any) -> Result | int | None:
        if view is None:
            return None
        base, offset = home.place(view.address)
        return out if base < len(layouts) else Result((base, offset), view.shape, view.strides, view.dtype)

    return Plan(list(home.sizes.values()), home.steps, (result(loss), result(gradient)))


class Rehearsal(Home):
    """A device with made-up memory, which keeps the steps of a call and does none."""

    PIECE = 256  # bytes that memory is aligned to
    SMALL = 4096  # bytes up to which it is asked for together, and is kept as long as any of it

    def __init__(self, number: int) -> None:
        super().__init__(number, None)
        self.bases: list[int] = []
        self.sizes: dict[int, int] = {}  # of the bases that are memory asked for
        self.steps: list[Step] = []
        self._together: int | None = None

    def base(self, misaligned: int = 0) -> int:
        """A new base; in the middle of its span, as strides may be negative."""
        self.bases.append(SPAN * (len(self.bases) + 1) + SPAN // 2 + misaligned)
        return len(self.bases) - 1

    def place(self, address: int) -> Place:
        """Where a made-up address lies."""
        base = address // SPAN - 1
        return base, address - self.bases[base]

    def allocate(self, size: int) -> tuple[int, object]:
        small = size <= self.SMALL
        base = self._together if small else None
        if base is None:
            base = self.base()
            self._together = base if small else self._together
        offset = self.sizes.get(base, 0)
        self.sizes[base] = offset + -(-max(size, 1) // self.PIECE) * self.PIECE
        return self.bases[base] + offset, None

    def clear(self, address: int, size: int) -> None:
        base, offset = self.place(address)
        self.steps.append(lambda home, bases: home.clear(bases[base] + offset, size))

    def fill(self, address: int, source: Array) -> None:
        base, offset = self.place(address)
        self.steps.append(lambda home, bases: home.fill(bases[base] + offset, source))

    def has_fault(self, address: int) -> bool:
        base, offset = self.place(address)
        self.steps.append(lambda home, bases: home.has_fault(bases[base] + offset))
        return False

    def launch(self, kernel: Any, blocks: int, threads: int, *arguments: Any, **how: Any) -> None:
        numbers = enumerate(parameters(arguments))
        moved = [(k, *self.place(n)) for k, n in numbers if isinstance(n, int) and n >= SPAN]
        launch = device.memory().Launch(kernel, blocks, threads, self.number, arguments, moved=moved, **how)
        self.steps.append(lambda home, bases: launch.start(home.stream, bases))

    def download(self, view: DeviceView) -> Array:
        raise RuntimeError("what depends on values of the device cannot be rehearsed")
