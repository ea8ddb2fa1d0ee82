"""Tables and charts of the Overview page: what a model is made of, its text, its runs."""
