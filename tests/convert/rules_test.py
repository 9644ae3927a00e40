"""Strict two-way conversion on tables small enough to follow by hand."""

import ml_dtypes
import numpy as np
import pytest

from paras2s_jax.convert.rules import (
    CONV1D,
    LINEAR,
    ConversionError,
    Rule,
    check_shapes,
    export_params,
    import_params,
    plan,
)

RULES = [
    Rule("blocks.{i}.fc.weight", "blocks/fc/kernel", LINEAR, range(1, 3)),
    Rule("up.{i}.bias", "up_{i}/bias", over=range(2)),
    Rule("conv.weight", "conv/kernel", CONV1D),
]


def _tensors() -> dict[str, np.ndarray]:
    return {
        "blocks.1.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "blocks.2.fc.weight": np.arange(6, 12, dtype=np.float32).reshape(2, 3),
        "up.0.bias": np.ones(2, np.float32),
        "up.1.bias": np.full(3, 2, np.float32),
        "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    }


def _expected() -> dict:
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    return {
        "blocks": {"fc": {"kernel": zeros(2, 3, 2)}},
        "up_0": {"bias": zeros(2)},
        "up_1": {"bias": zeros(3)},
        "conv": {"kernel": zeros(4, 3, 2)},
    }


def test_stacks_transposes_and_numbers():
    params = import_params(_tensors(), RULES, _expected())
    # Block 1 is [[0, 1, 2], [3, 4, 5]] as [out, in]; its kernel is [in, out].
    np.testing.assert_array_equal(params["blocks"]["fc"]["kernel"][0], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(params["blocks"]["fc"]["kernel"][1][:, 0], [6, 7, 8])
    np.testing.assert_array_equal(params["up_1"]["bias"], [2, 2, 2])
    assert params["conv"]["kernel"][3, 1, 0] == _tensors()["conv.weight"][0, 1, 3]


def test_export_inverts_import():
    tensors = export_params(import_params(_tensors(), RULES, _expected()), RULES)
    assert set(tensors) == set(_tensors())
    for key, value in _tensors().items():
        np.testing.assert_array_equal(tensors[key], value)


def test_every_mismatch_is_listed():
    tensors = _tensors()
    del tensors["up.1.bias"]
    tensors["head.weight"] = np.zeros(1, np.float32)
    expected = _expected() | {"norm": {"scale": np.zeros(1)}}
    with pytest.raises(ConversionError) as error:
        import_params(tensors, RULES, expected, name="a.safetensors")
    message = str(error.value)
    assert "a.safetensors" in message
    assert "missing from it: up.1.bias" in message
    assert "not used by the model: head.weight" in message
    assert "parameters left empty: norm/scale" in message


def test_ignored_keys_may_stay():
    tensors = _tensors() | {"rotary.inv_freq": np.zeros(1, np.float32)}
    import_params(tensors, RULES, _expected(), ignore=[r"rotary\..*"])


def test_wrong_shape_is_named():
    tensors = _tensors() | {"conv.weight": np.zeros((2, 3, 5), np.float32)}
    message = r"conv.weight is \(2, 3, 5\), conv/kernel needs \(2, 3, 4\)"
    with pytest.raises(ConversionError, match=message):
        import_params(tensors, RULES, _expected())


def test_export_refuses_parameters_without_a_rule():
    params = import_params(_tensors(), RULES, _expected()) | {"lora": {"a": np.zeros(1)}}
    with pytest.raises(ConversionError, match="without a rule: lora/a"):
        export_params(params, RULES)


def _shapes(**changed) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in _tensors().items()} | changed


def test_shapes_alone_tell_whether_a_checkpoint_fits():
    check_shapes(_shapes(), RULES, _expected())
    check_shapes(_shapes(extra=(9,)), RULES, _expected(), ignore=["extra"])


@pytest.mark.parametrize(
    ("changed", "rules", "message"),
    [
        # The kernel (2 layers, in 3, out 2) is stored as [out 2, in 3] per layer.
        (
            {"blocks.2.fc.weight": (3, 2)},
            RULES,
            r"blocks\.2\.fc\.weight is \(3, 2\), blocks/fc/kernel needs \(2, 3\)",
        ),
        ({"up.0.bias": ()}, RULES, r"up\.0\.bias is \(\), up_0/bias needs \(2,\)"),
        (
            {"blocks.0.fc.weight": (2, 3)},
            [Rule("blocks.{i}.fc.weight", "blocks/fc/kernel", LINEAR, range(3)), *RULES[1:]],
            r"needs 3 tensors of \(3, 2\), while the model stacks \(2,\)",
        ),
        ({}, [*RULES[:2], Rule("conv.weight", "conv/kernel", LINEAR)], "needs 2 axes"),
        ({}, [*RULES, Rule("up.1.bias", "up_0/bias")], r"used twice: up\.1\.bias"),
        ({}, [*RULES, Rule("up.1.bias", "up_0/bias")], "filled twice: up_0/bias"),
        ({}, RULES[:2], "not used by the model: conv.weight; parameters left empty: conv/kernel"),
    ],
)
def test_every_misfit_of_shapes_is_told(changed, rules, message):
    with pytest.raises(ConversionError, match=message):
        check_shapes(_shapes() | changed, rules, _expected())


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("blocks/fc/kernel", (slice(1, 2),)),
        ("blocks/fc/kernel", (slice(None), slice(1, 3), slice(0, 1))),
        ("conv/kernel", (slice(0, 3), slice(None), slice(1, None))),
        ("up_1/bias", (slice(1, 3),)),
        ("up_0/bias", ()),
    ],
)
def test_a_part_is_that_of_the_whole(path, index):
    parameter = plan(_tensors(), RULES, _expected())[path]
    np.testing.assert_array_equal(parameter.read(index), np.asarray(parameter)[index])


def test_only_what_is_asked_for_is_read():
    class Counting(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    tensors, read = Counting(_tensors()), []
    planned = plan(tensors, RULES, _expected())
    read.clear()  # shapes and types
    planned["blocks/fc/kernel"].read((slice(1, 2),))
    assert read == ["blocks.2.fc.weight"]


def test_types_of_the_result():
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in _tensors().items()}
    tensors["conv.weight"] = tensors["conv.weight"].astype(np.float32)

    def kinds(dtype):
        params = import_params(tensors, RULES, _expected(), dtype=dtype)
        return {str(x.dtype) for x in (params["conv"]["kernel"], params["up_0"]["bias"])}

    assert kinds(None) == {"float32"}
    assert kinds("stored") == {"float32", "bfloat16"}
    assert kinds(np.float16) == {"float16"}


def test_values_outside_of_the_type_are_an_error():
    tensors = _tensors() | {"up.0.bias": np.float32([1e6, 0])}
    import_params(tensors, RULES, _expected(), dtype=ml_dtypes.bfloat16)
    with pytest.raises(ConversionError, match=r"up\.0\.bias exceeds the range of float16"):
        import_params(tensors, RULES, _expected(), dtype=np.float16)


def test_integers_keep_their_type():
    expected = _expected() | {"up_0": {"bias": np.zeros(2, np.int32)}}
    params = import_params(_tensors(), RULES, expected, dtype=np.float16)
    assert params["up_0"]["bias"].dtype == np.int32
