"""Entry point of the dashboard: page configuration, navigation, sidebar. Start it with ``streamlit run app.py``."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from pages.components import css, navigation, sidebar, state

ASSETS = Path(__file__).resolve().parent / "assets"

page = st.navigation(navigation.pages())
st.set_page_config(page_title=navigation.tab_title(page), page_icon=str(ASSETS / "logo-mark.svg"), layout="wide")
st.logo(str(ASSETS / "logo.svg"), size="large", icon_image=str(ASSETS / "logo-mark.svg"))
css.apply()
state.begin()
sidebar.show()
page.run()
