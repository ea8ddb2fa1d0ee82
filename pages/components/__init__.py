"""What the pages share: navigation, state, layout, charts and forms."""
