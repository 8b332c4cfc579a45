"""What people look at: pictures of tokens, tables, plots and the report."""
