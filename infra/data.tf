# Records

resource "google_firestore_database" "records" {
  count = var.create_firestore_database ? 1 : 0

  name                              = var.firestore_database
  location_id                       = coalesce(var.firestore_location, var.region)
  type                              = "FIRESTORE_NATIVE"
  concurrency_mode                  = "PESSIMISTIC"
  app_engine_integration_mode       = "DISABLED"
  point_in_time_recovery_enablement = "POINT_IN_TIME_RECOVERY_ENABLED"
  delete_protection_state           = var.deletion_protection ? "DELETE_PROTECTION_ENABLED" : "DELETE_PROTECTION_DISABLED"
  deletion_policy                   = "DELETE"

  depends_on = [google_project_service.used]
}

locals {
  # The file that Firebase's own tools and the emulator read too.
  firestore = jsondecode(file("${path.module}/firestore.indexes.json"))
}

resource "google_firestore_index" "exports" {
  for_each = {
    for index in local.firestore.indexes :
    join("-", concat([index.collectionGroup], [for field in index.fields : field.fieldPath])) => index
  }

  database    = var.firestore_database
  collection  = each.value.collectionGroup
  query_scope = each.value.queryScope

  dynamic "fields" {
    for_each = each.value.fields

    content {
      field_path = fields.value.fieldPath
      order      = fields.value.order
    }
  }

  depends_on = [google_project_service.used, google_firestore_database.records]
}

resource "google_firestore_field" "unindexed" {
  for_each = { for field in local.firestore.fieldOverrides : "${field.collectionGroup}-${field.fieldPath}" => field }

  database   = var.firestore_database
  collection = each.value.collectionGroup
  field      = each.value.fieldPath

  # Empty: nothing asks for it, and what has no index is written faster and has no limit of 1500 bytes.
  index_config {}

  depends_on = [google_project_service.used, google_firestore_database.records]
}

# Artifacts. There is no lifecycle rule, since none can tell a published version from an abandoned one: the sweep collects.

resource "google_storage_bucket" "artifacts" {
  name                        = local.bucket
  location                    = coalesce(var.bucket_location, var.region)
  storage_class               = "STANDARD"
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = !var.deletion_protection

  # What was removed by mistake can be restored for a week.
  soft_delete_policy {
    retention_duration_seconds = 7 * 24 * 3600
  }

  depends_on = [google_project_service.used]
}
