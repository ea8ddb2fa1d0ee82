"""Plotly figures from the records of ``lowrank_core.views``: pictures only, no reading and no Streamlit."""
