import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.elements import FLOAT32_EXACT_UP_TO, ElementIndex

shapes = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    min_size=1,
    max_size=6,
)


@given(shapes=shapes)
def test_every_element_has_a_number_of_its_own_that_leads_back_to_it(shapes):
    index = ElementIndex(shapes)
    numbers = []
    for name, shape in shapes.items():
        values = index.values(name)
        assert values.shape == shape
        for position, value in np.ndenumerate(values):
            element = index.decode(value)
            assert (element.name, element.index) == (name, position)
        numbers += values.ravel().tolist()
    assert sorted(numbers) == list(range(1, sum(map(math.prod, shapes.values())) + 1))


@pytest.mark.parametrize("value", [0, -1, 11, 2.5, math.nan, math.inf])
def test_a_value_that_was_never_written_names_no_element(value):
    index = ElementIndex({"a": (2, 3), "b": (4,)})
    with pytest.raises(ValueError, match="names no element: their numbers are 1 to 10"):
        index.decode(value)


def test_a_tensor_without_elements_is_passed_over():
    index = ElementIndex({"a": (2,), "b": (0, 3), "c": (1,)})
    assert str(index.decode(3)) == "c[0]"


def test_float64_is_taken_as_soon_as_float32_would_round_a_number():
    assert int(np.float32(FLOAT32_EXACT_UP_TO)) == FLOAT32_EXACT_UP_TO
    assert int(np.float32(FLOAT32_EXACT_UP_TO + 1)) != FLOAT32_EXACT_UP_TO + 1
    assert ElementIndex({"a": (FLOAT32_EXACT_UP_TO,)}).dtype == "float32"
    assert ElementIndex({"a": (FLOAT32_EXACT_UP_TO,), "b": (1,)}).dtype == "float64"
