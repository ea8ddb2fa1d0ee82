"""Widgets that show what was chosen elsewhere."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest


def page() -> None:
    import streamlit as st

    from pages.components import state

    given = st.number_input("Given", 0, 9, 1, key="given")
    heeded = st.toggle("Heeded", key="heeded")
    value = state.held("taken", given) if heeded else given
    name = state.control("shown", value)
    st.slider("Shown", 0, 9, key=name, on_change=lambda: state.keep("taken", state.held(name, 0)))


def test_a_widget_whose_value_changed_elsewhere_is_another_one():
    test = AppTest.from_function(page).run()
    (first,) = test.slider
    assert (first.key, first.value) == ("shown", 1)
    test.number_input(key="given").set_value(5).run()
    (second,) = test.slider
    assert second.value == 5
    assert second.key != first.key
    test.run()
    assert test.slider[0].key == second.key


def test_a_value_that_came_in_by_the_widget_itself_keeps_it():
    test = AppTest.from_function(page).run()
    test.toggle(key="heeded").set_value(True).run()
    key = test.slider[0].key
    test.slider[0].set_value(7).run()
    assert (test.slider[0].key, test.slider[0].value) == (key, 7)


def test_a_widget_shows_what_it_is_told_whatever_came_in():
    test = AppTest.from_function(page).run()
    key = test.slider[0].key
    test.slider[0].set_value(7).run()
    assert test.slider[0].value == 1
    assert test.slider[0].key != key
