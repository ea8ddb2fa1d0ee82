"""What the dashboard and the report show: tidy tables, and charts drawn from them. Torch-free."""
