"""Images beside the texts of a row: where they stand (`places`), their files (`store`), what a model gets of them (`processor`,
`batch`)."""
