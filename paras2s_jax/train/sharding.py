"""Device meshes, and where arrays live on them. Rules are data: logical axis -> mesh axis."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paras2s_jax.models import axes
from paras2s_jax.models.placement import Rules, axes_of, dividing, logical_shardings, unbox

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with the axes data, fsdp and tensor; absent axes have size 1, one size may be -1.

    A mesh smaller than the machine takes the first devices.
    """
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; known are {list(MESH_AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(f"mesh sizes {dict(sizes)} must be positive, with at most one -1")
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known:
        raise ValueError(f"{len(devices)} devices do not fill a mesh of {dict(sizes)}")
    shape = [len(devices) // known if size == -1 else size for size in shape]
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {math.prod(shape)} devices, "
            f"but there are {len(devices)}; change `mesh` in the config"
        )
    # An axis may take a part of a physical ring: 8 of the 4 x 4 x 4 of a pod, say.
    placed = mesh_utils.create_device_mesh(
        shape, devices[: math.prod(shape)], allow_split_physical_axes=True
    )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Gives logical constraints inside models their meaning while functions are traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live: a mesh and the rules of logical axes on it.

    Without a mesh everything lives on one device, and every method still works.
    """

    mesh: Mesh | None = None
    rules: Rules = ()

    def active(self) -> contextlib.AbstractContextManager:
        """Context in which functions are traced, lowered and run for this layout."""
        return activate(self.mesh, self.rules) if self.mesh else contextlib.nullcontext()

    @property
    def whole(self) -> NamedSharding | None:
        """Of arrays that every device holds."""
        return NamedSharding(self.mesh, PartitionSpec()) if self.mesh else None

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Mesh axes that the rows of a batch are spread over."""
        return axes_of(dict(self.rules).get(axes.ACT_BATCH))

    @property
    def ways(self) -> int:
        """Into how many parts rows are spread."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes) if self.mesh else 1

    def shardings(self, boxed: Any) -> Any:
        """Shardings of boxed abstract variables (jax.eval_shape of an init); None each, no mesh."""
        if self.mesh is None:
            return jax.tree.map(lambda _: None, unbox(boxed))
        return logical_shardings(boxed, self.mesh, self.rules)

    def abstract(self, boxed: Any, dtype: Any = None) -> Any:
        """Boxed abstract variables as ShapeDtypeStructs that know their place; floats in dtype."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(
                leaf.shape, cast_dtype(leaf.dtype, dtype), sharding=sharding
            ),
            unbox(boxed),
            self.shardings(boxed),
            is_leaf=lambda x: x is None,
        )

    def place(self, tree: Any, boxed: Any) -> Any:
        """Arrays where the rules want them; those that are there already are not copied."""
        if self.mesh is None:
            return tree
        return jax.tree.map(_put, tree, self.shardings(boxed))

    def replicate_rest(self, tree: Any) -> Any:
        """Arrays on every device; those that lie on a mesh already stay as they are."""

        def place(x):
            is_placed = isinstance(getattr(x, "sharding", None), NamedSharding)
            return x if is_placed else _put(x, self.whole)

        return tree if self.mesh is None else jax.tree.map(place, tree)

    def rows(self, tree: Any, *, grouped: bool = False) -> Any:
        """Shardings of arrays with leading rows [B, …], or prompts and answers [P, G, …].

        Rows are spread over the batch axes; where prompts are too few for all of these, answers
        take the rest. Arrays without axes are everywhere.
        """
        return jax.tree.map(lambda x: self._of_rows(x.shape, grouped), tree)

    def take(self, tree: Any, *, grouped: bool = False) -> Any:
        """Arrays of another layout over the same devices, laid as `rows` says.

        What lies there already is not copied. ShapeDtypeStructs are answered in kind.
        """
        if self.mesh is None:
            return tree
        shardings = self.rows(tree, grouped=grouped)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
            return _with_shardings(tree, shardings)
        return jax.tree.map(_move, tree, shardings)

    def _of_rows(self, shape: Sequence[int], grouped: bool) -> NamedSharding | None:
        if self.mesh is None:
            return None
        left, spec = self.batch_axes, []
        for size in shape[: 2 if grouped else 1]:
            used = dividing(left, size, self.mesh.shape)
            spec.append(used or None)
            left = left[len(used) :]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def local_rows(self, num_rows: int) -> np.ndarray | None:
        """Which rows of a global batch lie on this process's devices: int[n], ascending.

        Processes that share rows (over tensor, say) get the same ones. None, all, without a mesh.
        """
        if self.mesh is None:
            return None
        held = self._of_rows((num_rows,), False).addressable_devices_indices_map((num_rows,))
        return np.unique(np.concatenate([np.arange(num_rows)[index] for index in held.values()]))

    def place_batch(self, batch: Mapping[str, Any], group_size: int = 1) -> dict[str, Any]:
        """Global arrays, rows spread, of this process's `local_rows`; as it is without a mesh.

        group_size: answers to each row, which are spread too.

        Raises:
            ValueError: the rows do not divide.
        """
        if self.mesh is None:
            return dict(batch)

        def place(path, x):
            x = np.asarray(x)
            if not x.ndim:
                return jax.device_put(x, self.whole)
            num_rows = self._num_rows(len(x))
            if num_rows * group_size % self.ways:
                raise ValueError(
                    f"batch{jax.tree_util.keystr(path)}: {num_rows * group_size} rows do not "
                    f"divide over {self.ways} devices ({' x '.join(self.batch_axes)}); change "
                    "the batch size or `mesh`"
                )
            rows = self.local_rows(num_rows)

            def part(index):
                return x[np.searchsorted(rows, np.arange(num_rows)[index[0]])]

            shape = (num_rows, *x.shape[1:])
            return jax.make_array_from_callback(shape, self._of_rows(shape, False), part)

        return jax.tree_util.tree_map_with_path(place, dict(batch))

    def _num_rows(self, held: int) -> int:
        """Rows of the global batch of which this process holds so many."""
        for count in range(len(self.batch_axes), -1, -1):
            names = self.batch_axes[:count]
            ways = math.prod(self.mesh.shape[name] for name in names)
            spread = NamedSharding(self.mesh, PartitionSpec(names or None))
            parts = len(set(map(str, spread.addressable_devices_indices_map((ways,)).values())))
            if held % parts == 0:
                return held // parts * ways
        return held


ONE_DEVICE = Layout()


@dataclasses.dataclass(frozen=True)
class Layouts:
    """Of one run, over the same devices in the same order: for training and for decoding."""

    train: Layout = ONE_DEVICE
    decode: Layout = ONE_DEVICE


ONE_DEVICE_LAYOUTS = Layouts()


def make_layouts(
    mesh: Mapping[str, int],
    rules: Rules,
    decode_mesh: Mapping[str, int] | None = None,
    decode_rules: Rules | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Layouts:
    """Layouts of mesh sizes (see make_mesh); what is not given for decoding is as in training.

    The mesh with the longer tensor axis chooses the order of the devices, for its communication is
    the most frequent.

    Raises:
        ValueError: the meshes are of different sizes, or one is impossible.
    """
    train = make_mesh(mesh, devices)
    decode = make_mesh(mesh if decode_mesh is None else decode_mesh, devices)
    if train.size != decode.size:
        raise ValueError(
            f"mesh has {train.size} devices and decode_mesh {decode.size}; make them equal"
        )
    first = max(train, decode, key=lambda mesh: mesh.shape["tensor"])
    train, decode = (
        Mesh(first.devices.reshape(mesh.devices.shape), MESH_AXES, axis_types=mesh.axis_types)
        for mesh in (train, decode)
    )
    return Layouts(
        Layout(train, rules), Layout(decode, rules if decode_rules is None else decode_rules)
    )


def cast_dtype(dtype: Any, wanted: Any) -> Any:
    """The wanted dtype for floats, theirs for other numbers and if none is wanted."""
    return wanted if wanted is not None and jnp.issubdtype(dtype, jnp.floating) else dtype


class Program:
    """A jitted function that is always traced, lowered and run with its layout active.

    name: of a phase, for plans and messages. function: pure. place: from the abstract result to its
    shardings, such as layout.rows; without it the compiler chooses. shardings: of the result, where
    they are known beforehand and may be of another mesh over the same devices. options: of jax.jit.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        layout: Layout,
        *,
        place: Callable[[Any], Any] | None = None,
        shardings: Any = None,
        **options: Any,
    ):
        self.name, self.layout = name, layout
        self._function = function
        self._place = place if layout.mesh is not None else None
        if shardings is not None:
            self._place, options = lambda _: shardings, options | {"out_shardings": shardings}

        def run(*args):
            result = function(*args)
            if self._place is None or shardings is not None:
                return result
            return jax.lax.with_sharding_constraint(result, self._place(result))

        run.__name__ = name
        self._jitted = jax.jit(run, **options)

    def __call__(self, *args: Any) -> Any:
        with self.layout.active():
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers for ahead-of-time compilation; leaves may be ShapeDtypeStructs."""
        with self.layout.active():
            return self._jitted.lower(*args)

    def outputs(self, *args: Any) -> Any:
        """What a call would return, as ShapeDtypeStructs; with shardings where `place` gives them.

        Nothing is compiled.
        """
        with self.layout.active():
            result = jax.eval_shape(self._function, *args)
        if self._place is None:
            return result
        return _with_shardings(result, self._place(result))


def _put(x: Any, to: NamedSharding) -> jax.Array:
    """device_put, of what every process has for itself too.

    From a jax.Array of one device, JAX 0.10 makes a global one that cannot be saved where each
    process has one device; from numpy it makes a right one.
    """
    is_own = isinstance(x, jax.Array) and x.is_fully_addressable and not to.is_fully_addressable
    return jax.device_put(jax.device_get(x) if is_own else x, to)


def _move(x: jax.Array, to: NamedSharding) -> jax.Array:
    """An array where it is wanted; keys as the numbers they are, which alone go between hosts."""
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(x, to)
    moved = jax.device_put(jax.random.key_data(x), to)
    return jax.random.wrap_key_data(moved, impl=jax.random.key_impl(x))


def _with_shardings(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of a tree's leaves."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def init_sharded(model: nn.Module, mesh: Mesh, rules: Rules, rng: jax.Array, *args, **kwargs):
    """Initialises every variable directly where it lives; no device holds the whole model.

    Returns: (variables, shardings), two plain trees of equal structure.
    """

    def init(rng, *args):
        return model.init(rng, *args, **kwargs)

    shardings = logical_shardings(jax.eval_shape(init, rng, *args), mesh, rules)
    make = jax.jit(lambda rng, *args: unbox(init(rng, *args)), out_shardings=shardings)
    return make(rng, *args), shardings


def replicate_rest(tree: Any) -> Any:
    """Puts leaves that are on no mesh (step, counters) on the mesh of the others, replicated.

    Without a mesh all go to the first device, for good: what a jitted step returns is bound to a
    device, and a step would be compiled once for leaves that are and once for leaves that are not.
    """
    named = [x.sharding for x in jax.tree.leaves(tree) if isinstance(x.sharding, NamedSharding)]
    if not named:
        return jax.device_put(tree, jax.local_devices()[0])
    whole = NamedSharding(named[0].mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else _put(x, whole), tree
    )
