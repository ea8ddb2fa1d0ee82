"""Tables and charts of the dashboard and the report. Torch-free."""
